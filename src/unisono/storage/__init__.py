"""Files that are whole or absent, the run folder, its lock, checkpoints."""
