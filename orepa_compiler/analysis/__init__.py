"""Finds what captured forwards compute: linear regions, sums of branches, the forms of maps."""
