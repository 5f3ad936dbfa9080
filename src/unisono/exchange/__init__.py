"""How contributions reach their owners, and new weights everybody."""
