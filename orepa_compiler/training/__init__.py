"""Helps training: kernels once per step, parameter groups, optimizers, branches watched."""
