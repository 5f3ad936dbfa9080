"""Starting workers, joining them, ending them."""
