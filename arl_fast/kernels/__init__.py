"""Fused implementations; each is imported only when it is chosen."""
