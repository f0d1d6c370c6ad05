"""Runs a command once its options are known to be right."""
