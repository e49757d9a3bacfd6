"""The stages of a run. Each file reads like a page; the mathematics stands elsewhere."""
