"""Models of libraries that a user may have installed: the round trip, and the export, of each."""
