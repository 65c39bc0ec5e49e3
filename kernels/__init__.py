"""Device code: Triton kernels with their launchers, and the compiled module. Knows nothing of the rest of fastcifar."""
