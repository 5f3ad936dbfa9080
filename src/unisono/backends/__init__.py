"""What computes a contribution: one framework behind one interface over named arrays. torch is the first."""
