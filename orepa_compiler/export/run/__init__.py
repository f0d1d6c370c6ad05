"""Runs exported files on torch tensors."""
