"""Finds what a forward does that its graph does not hold."""
