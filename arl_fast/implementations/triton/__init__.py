"""The Triton kernels: host.py offers the contract, plan.py chooses shapes, launch.py launches, the rest is device code."""
