"""What a Python user calls, and the command line after it: train, verify, evaluate, predict, load, prepare."""
