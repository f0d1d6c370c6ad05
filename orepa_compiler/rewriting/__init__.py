"""Exchanges modules of a model, and puts it back as it was when that fails."""
