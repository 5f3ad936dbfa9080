"""The only door to other workers."""
