"""data/screening."""
