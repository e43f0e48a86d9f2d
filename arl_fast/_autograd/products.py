"""The products of a linear head: from features to logits, and from their gradients to the parameters'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.dtypes import compute_dtype

# Bytes that a chunk's logits and their gradients may take, by type of device. More rows make the products
# faster until they fill the machine, and a GPU needs many (docs/performance.md).
BUDGET = {"cpu": 128 << 20}
DEFAULT_BUDGET = 1 << 30


def chunk_rows(rows: int, classes: int, modalities: int, dtype: torch.dtype, device: str) -> int:
    """Rows of logits that are held at once: as many as the budget allows, in chunks of about equal size."""
    # a logit and its gradient
    size = dtype.itemsize + max(dtype.itemsize, 4 if dtype == torch.float16 else 0)
    most = max(1, BUDGET.get(device, DEFAULT_BUDGET) // ((modalities + 1) * classes * size))
    if rows <= most:
        return most
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // 16) * 16)


def take(x: Tensor, part: slice | None) -> Tensor:
    """The rows of a chunk; None: all."""
    return x if part is None else x[part]


def times(g: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """g * factor in the factor's dtype, in place unless ``keep``."""
    wide = g.to(factor.dtype)
    return wide * factor if keep and wide is g else wide.mul_(factor)


class Layout(NamedTuple):
    """What a flat list of tensors means: ``modalities`` features, then ``weights`` matrices, then biases."""

    fusion: str
    bias_mode: str
    modalities: int
    weights: int
    dtype: torch.dtype  # of the products and the logits
    chunk: int  # rows
    return_logits: bool

    @property
    def one_bias(self) -> bool:
        """One bias, which every branch gets once, the fused one too."""
        return self.fusion == "concat" and self.bias_mode == "full"

    def split(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Features, weights, biases."""
        end = self.modalities + self.weights
        return list(tensors[: self.modalities]), list(tensors[self.modalities : end]), list(tensors[end:])

    def parts(self, rows: int) -> list[slice | None]:
        """The chunks of so many rows; None: all at once."""
        if self.chunk >= rows:
            return [None]
        return [slice(start, min(rows, start + self.chunk)) for start in range(0, rows, self.chunk)]

    def by_modality(self, weights: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        """W_m [C, D_m]: columns of one matrix, the shared one M times, or each its own. None stays None."""
        if len(weights) > 1:
            return list(weights)
        if self.fusion == "shared" or weights[0] is None:
            return [weights[0]] * self.modalities
        return list(weights[0].split(list(sizes), 1))

    def logits(
        self, features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> list[Tensor]:
        """Features [n, D_m] and W_m [C, D_m] -> the M+1 logits [n, C], the fused ones first."""
        own: list[Tensor | None] = [None] * self.modalities
        if self.one_bias and biases:
            own[0] = biases[0]  # so that the sum of the parts has it once
        elif biases:
            own = [biases[0] / self.modalities if self.fusion == "concat" else biases[0]] * self.modalities
            own = own if len(biases) == 1 else list(biases)
        parts = [F.linear(z, w, b) for z, w, b in zip(features, weights, own, strict=True)]
        fused = parts[0]
        for m, part in enumerate(parts[1:]):
            fused = fused + part if m == 0 else fused.add_(part)
        if self.one_bias and biases:
            parts[1:] = [part.add_(biases[0]) for part in parts[1:]]
        return [fused, *parts]


class GradientSums:
    """Gradients of features, weights and biases, added up over chunks of rows.

    A sum of several products is kept in float32 (float64 for float64), a single product as the BLAS writes
    it.

    Args:
        layout: what the tensors are.
        tensors: features [N, D_m], weights and biases in the dtype of the products.
        needs: which of them get a gradient.
    """

    def __init__(self, layout: Layout, tensors: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.layout = layout
        features, weights, biases = layout.split(tensors)
        self.needs_features, needs_weights, self.needs_biases = layout.split(needs)
        self.rows = features[0].shape[0]
        single = layout.chunk >= self.rows and layout.fusion != "shared"
        dtype = layout.dtype if single else compute_dtype(layout.dtype)
        self.features: list[Tensor | None] = [None] * len(features)
        self.weights = [
            torch.empty_like(w, dtype=dtype) if need else None
            for w, need in zip(weights, needs_weights, strict=True)
        ]
        self.weights_by_modality = layout.by_modality(self.weights, [z.shape[1] for z in features])
        self.biases: list[Tensor | None] = [None] * len(biases)

    def add(
        self,
        part: slice | None,
        grads: Sequence[Tensor],
        features: Sequence[Tensor],
        weights: Sequence[Tensor],
    ) -> None:
        """Add what the gradients [n, C] of some rows' logits give; these gradients are overwritten."""
        layout = self.layout
        first = part is None or part.start == 0
        fused, *own = grads
        if layout.one_bias and self.biases:
            for g in grads:
                self._add_bias(0, g)
        for m, (g, z, w) in enumerate(zip(own, features, weights, strict=True)):
            total = g.add_(fused)
            if self.needs_features[m]:
                self._put_features(m, part, total, w)
            out = self.weights_by_modality[m]
            if out is not None:
                _add_product(out, total.t(), z, first and (m == 0 or layout.fusion != "shared"))
            if not layout.one_bias and self.biases:
                self._add_bias(m if len(self.biases) > 1 else 0, total)

    def _put_features(self, m: int, part: slice | None, total: Tensor, w: Tensor) -> None:
        whole = self.features[m]
        if whole is None:
            whole = self.features[m] = total.new_empty(self.rows, w.shape[1])
        _add_product(take(whole, part), total, w, True)

    def _add_bias(self, position: int, g: Tensor) -> None:
        if self.needs_biases[position]:
            column = g.sum(0, dtype=compute_dtype(g.dtype))
            if self.layout.fusion == "concat" and not self.layout.one_bias:
                column = column / self.layout.modalities
            before = self.biases[position]
            self.biases[position] = column if before is None else before + column


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out += a @ b; the first product overwrites."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=0 if first else 1)
    elif first:
        out.copy_(torch.mm(a, b))
    else:
        out.add_(torch.mm(a, b))
