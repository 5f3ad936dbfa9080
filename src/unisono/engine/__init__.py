"""What becomes of a step's microbatches, from the loop to the committed state."""
