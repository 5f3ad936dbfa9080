"""data/encoding."""
