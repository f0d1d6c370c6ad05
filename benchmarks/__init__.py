"""Measurements of the library, each one command that prints a table and writes JSON."""
