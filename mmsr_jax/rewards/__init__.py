"""What a finished episode is worth: accuracy, format, and the price of searching. No jax here."""
