"""Records in, samples out: read, screen, encode, store; then order and feed."""
