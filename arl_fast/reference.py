"""The oracle: ``arl_loss`` in plain torch, whatever else could serve the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import loss
from ._core.spec import BranchStats
from .implementations import reference


def arl_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, BranchStats]:
    """``arl_fast.arl_loss``, with its arguments, computed by ``arl_fast.implementations.reference``."""
    return loss.arl_loss(*args, **{**kwargs, "implementation": reference})
