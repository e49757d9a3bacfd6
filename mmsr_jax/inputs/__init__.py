"""From text and pictures to arrays: tokenizer, images, chat template, layout, padding."""
