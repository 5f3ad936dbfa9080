"""What starts workers: in this process, forked, spawned, or torchrun's."""
