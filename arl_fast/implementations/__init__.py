"""The implementations of one contract (docs/architecture.md): reference, native, triton, sharded; dispatch.py chooses."""
