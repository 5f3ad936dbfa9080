"""data/ingest."""
