"""What a training step costs beside the plain model's: time, memory, and what backward keeps."""
