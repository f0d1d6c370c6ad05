"""What only a GPU can tell: engines compared with the model, and latencies beside the stock net."""
