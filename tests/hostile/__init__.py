"""Models written to be got wrong in silence: each comes out exact, is left alone, or is refused."""
