"""Refuses an export that is not what was asked for: before, and in the file itself."""
