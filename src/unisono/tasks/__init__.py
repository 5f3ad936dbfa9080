"""What can be trained: the task interface, and presets."""
