"""The implementations of one contract (docs/architecture.md); dispatch.py chooses among them."""
