"""What a person or a program sees of a run: the screen, the metrics, the curves."""
