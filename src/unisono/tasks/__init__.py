"""What is learned: the interface of a task, its metrics, and the presets."""
