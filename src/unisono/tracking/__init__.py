"""The records and the output of a run: events, the ledger, the terminal, loggers, where the time went."""
