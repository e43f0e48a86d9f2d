<<<<<<< HEAD
"""The CUDA kernels of csrc/cuda on a CPU: their sources as C++ after cuda_emulation.h, through ctypes.
=======
"""The CUDA kernels on a CPU: the same sources as C++ after cuda_emulation.h, called through ctypes.
>>>>>>> main

``emulation.module`` is an implementation of the package's contract, for CPU tensors.
"""
