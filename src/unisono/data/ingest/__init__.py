"""Sources of all kinds and formats, read as column batches."""
