"""A run as processes live it: the supervisor, its workers, how a run begins, goes on after a loss, and ends."""
