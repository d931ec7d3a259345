"""The cpu device: op tapes walked by a thread team, kernels emitted through Numba and llvmlite."""
