"""Datasets: TFDS builders, and the pipeline from their records to `Example`."""
