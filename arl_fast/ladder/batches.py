"""Tensors in memory as batches, for data that fit there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Batches:
    """(inputs by modality, target) in batches; every iteration is an epoch in a new order, which
    ``generator`` fixes.

    Args:
        x: tensors of the same number of rows by modality.
        y: targets, one per row.
        size: rows in a batch; None: all, in the given order.
    """

    def __init__(self, x: Mapping[str, Tensor], y: Tensor, size: int | None = None) -> None:
        for name, values in x.items():
            if len(values) != len(y):
                raise ValueError(
                    f"x[{name!r}]: got {len(values)} rows, expected as many as there are targets, {len(y)}"
                )
        self.x, self.y, self.size = dict(x), y, size
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        if self.size is None:
            yield self.x, self.y
            return
        for rows in torch.randperm(len(self.y), generator=self.generator).split(self.size):
            yield {name: values[rows] for name, values in self.x.items()}, self.y[rows]
