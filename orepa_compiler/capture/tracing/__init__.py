"""Traces one forward: the calls it makes, as an fx graph."""
