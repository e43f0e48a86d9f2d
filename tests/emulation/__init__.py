"""The CUDA kernels of csrc/cuda on a CPU: their sources as C++ after cuda_emulation.h, through ctypes.

``emulation.module`` is an implementation of the package's contract, for CPU tensors.
"""
