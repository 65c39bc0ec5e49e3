"""Operators: what a kernel needs around it, registration and autograd; one file an operator and implementation."""
