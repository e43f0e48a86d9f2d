"""``python -m arl_fast``: versions, and which implementation serves each device here, and why."""

import platform

import torch

from . import __version__
from .implementations.dispatch import report

print(f"arl_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
print(report())
