"""What is recorded and shown of a run: events, the ledger, the terminal, where the time went."""
