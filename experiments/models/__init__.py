"""Models of the experiments; ``build`` puts encoders and a head together."""

from .build import build

__all__ = ["build"]
