"""Triton kernels and their launchers. Importing this package compiles nothing."""

# The modules whose `static_cases()` list every kernel with every tile that may run.
KERNEL_MODULES = ("augment_launch", "batch_norm_cases", "depthwise_cases", "spectral_launch")
