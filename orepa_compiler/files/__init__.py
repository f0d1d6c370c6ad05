"""Writes files whole or not at all, and reads JSON from outside."""
