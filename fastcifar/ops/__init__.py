"""Operators: torch.library registration, fake kernels, autograd; one file an operator and implementation."""
