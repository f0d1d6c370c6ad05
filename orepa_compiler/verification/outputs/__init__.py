"""Compares one output of one batch: rounded, decided, or exact."""
