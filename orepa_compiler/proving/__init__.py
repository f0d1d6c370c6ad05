"""Proves that two models, or a model and a file, compute the same: verify, certify, locate."""
