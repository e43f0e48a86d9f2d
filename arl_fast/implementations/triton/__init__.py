"""The Triton implementation.

host.py offers the contract, plan.py chooses shapes, launch.py launches. forward.py, finish.py and multiply.py
are device code.
"""
