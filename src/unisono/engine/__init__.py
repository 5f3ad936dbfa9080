"""What becomes of a step's microbatches: contributions, their tree, the flat space, the optimiser."""
