"""A few minutes on a GPU: what only that can tell, the most telling first."""
