"""Triton kernels and their launchers. Importing this package compiles nothing.

Each module in KERNEL_MODULES has a function `static_cases()`: what to compile ahead of time, on a machine without GPU.
"""

KERNEL_MODULES = ("spectral",)
