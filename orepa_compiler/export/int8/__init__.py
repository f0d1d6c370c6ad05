"""Writes int8 as Q/DQ nodes, and judges an int8 file."""
