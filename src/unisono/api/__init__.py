"""The functions that a Python user calls, and the command line too: train, verify, evaluate, predict, load, prepare."""
