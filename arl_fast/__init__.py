"""arl_fast: Asymmetric Representation Learning (ARL, ICCV 2025) as a drop-in loss for multimodal training."""

import importlib
from typing import Any

from ._autograd.link import apply_gains, modulate
from ._core.branches import BranchLogits
from ._core.spec import BranchStats
from .check import Check, check
from .diagnose import diagnose
from .fusion import FusionWeights
from .heads import BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead
from .history import History
from .linear import linear_arl_loss
from .loss import ARLLoss, arl_loss
from .memory import release_memory

__version__ = "0.1.0"

__all__ = [
    "ARLLoss",
    "BilinearHead",
    "BranchLogits",
    "BranchStats",
    "Check",
    "ConcatHead",
    "FusionWeights",
    "GatedHead",
    "History",
    "SharedHead",
    "SumHead",
    "ZeroedHead",
    "apply_gains",
    "arl_loss",
    "check",
    "diagnose",
    "linear_arl_loss",
    "modulate",
    "release_memory",
]

_MODULES = ("distributed", "family", "integrations", "ladder", "optim", "plots", "reference", "sharded")


def __getattr__(name: str) -> Any:
    """The public modules that not every program needs, imported when they are first used."""
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
