"""An index on disk over documents and pictures: built once, opened by many processes."""
