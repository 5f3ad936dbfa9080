"""Processes: how they are forked and end with their parent, the table of what each does, injected faults."""
