"""What training asks for: kernels once per step, parameter groups, optimizers, branches watched."""
