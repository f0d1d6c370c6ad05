"""How often a verdict is right: faults that it catches, and right pairs that it fails."""
