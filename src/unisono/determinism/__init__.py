"""What fixes bits: random keys, the tree in which everything is added, the numeric layout."""
