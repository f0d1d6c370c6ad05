"""What a captured forward computes: linear regions, what stands around a conv, sums of branches."""
