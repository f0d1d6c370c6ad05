"""What int8 costs small nets on Fashion-MNIST: after training, and trained for."""
