"""Convolutions as values: parallel sum, composition, and the layers of torch that become one."""
