"""From the user's files or memory to microbatches."""
