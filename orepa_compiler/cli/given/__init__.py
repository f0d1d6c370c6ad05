"""Reads the words of a command line: options, models, inputs."""
