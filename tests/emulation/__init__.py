"""The CUDA kernels on a CPU: the same sources as C++ after cuda_emulation.h, called through ctypes.

``emulation.module`` is an implementation of the package's contract, for CPU tensors.
"""
