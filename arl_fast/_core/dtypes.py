"""Which dtype each result has, by the dtype of the logits."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Loss, statistics and row arithmetic: float64 for float64 logits, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients until backward: the logits' dtype, but float32 for float16 logits.

    A loss scale (torch.amp.GradScaler) must be applied before a gradient is rounded to float16, or it saves
    nothing.
    """
    return torch.float32 if dtype == torch.float16 else dtype
