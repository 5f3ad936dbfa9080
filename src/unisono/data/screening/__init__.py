"""Which records stay, what is changed in them, and the report on it."""
