"""The launches as registered ops, opaque to torch.compile: functional, with fakes that only state shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.dtypes import compute_dtype, grad_dtype
from .._core.stats import packed_length

library = torch.library.Library("arl_fast", "FRAGMENT")
library.define(
    "triton_forward(Tensor[] logits, Tensor target, Tensor? mask, Tensor? weight, Tensor? norm, Tensor? schedule, "
    "float gamma, float temperature, bool warming, str rule, str dependence, float? entropy_floor, str gain, "
    "int ignore_index, float label_smoothing, str reduction, bool grad) -> (Tensor, Tensor, Tensor[])"
)
library.define("triton_scale(Tensor[] grads, Tensor upstream, Tensor? factor, ScalarType dtype) -> Tensor[]")
library.define("triton_modulate(Tensor[] grads, int[] modalities, Tensor link) -> Tensor[]")


def register(name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"arl_fast::{name}", fake, lib=library)


def fake_forward(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *_, reduction, grad = arguments
    first = logits[0]
    dtype = compute_dtype(first.dtype)
    loss = first.new_empty(first.shape[:1] if reduction == "none" else (), dtype=dtype)
    packed = first.new_empty(packed_length(len(logits) - 1), dtype=dtype)
    return (
        loss,
        packed,
        [first.new_empty(first.shape, dtype=grad_dtype(first.dtype)) for _ in logits] if grad else [],
    )


def fake_scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    return [torch.empty_like(g, dtype=dtype) for g in grads]


def fake_modulate(grads: Sequence[Tensor], modalities: Sequence[int], link: Tensor) -> list[Tensor]:
    return [torch.empty_like(g, memory_format=torch.contiguous_format) for g in grads]
