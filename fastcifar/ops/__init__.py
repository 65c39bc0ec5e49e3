"""Operators: what a kernel needs around it, one file an operator."""
