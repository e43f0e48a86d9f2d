"""What fusion weights multiply: x_f = b + sum_m w_m (x_m - b_m), or a pool of all predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core.branches import BranchLogits
from ..heads import BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead

LINEAR = (ConcatHead, SumHead, SharedHead)
POOLED = (GatedHead, BilinearHead, ZeroedHead)


class Formula:
    """Of one head.

    Attributes:
        head: the head, whose biases are looked up when they are needed.
        names: of the modalities.
        pool: whether the weights are those of a pool, w_0 x_f + sum_m w_m x_m.
        plain: [M] or [M+1] weights with which the result is the plain fused logits.
    """

    def __init__(self, head: nn.Module | None, modalities: Sequence[str] | int | None) -> None:
        if head is not None and not isinstance(head, LINEAR + POOLED):
            raise TypeError(
                f"head: got {type(head).__name__}, expected the head itself, not what contains it: "
                "ConcatHead, SumHead or SharedHead for a weight per modality; GatedHead, BilinearHead, "
                "ZeroedHead or, for a head of your own, None for a pool of the predictions"
            )
        given = list(range(modalities)) if isinstance(modalities, int) else list(modalities or [])
        keys: list[Any] = given
        if head is not None and not isinstance(head, ZeroedHead):
            keys = list(head.names or range(len(head.dims)))
        if not keys:
            raise ValueError(
                "modalities: got none, expected their names or their number, which this head does not know"
            )
        if given and given != keys:
            raise ValueError(f"modalities: got {given}, expected those of the head, {keys}")
        self.head, self.keys = head, keys
        self.names = [str(key) for key in keys]
        self.pool = not isinstance(head, LINEAR)
        self.plain = torch.tensor([1.0] + [0.0] * len(keys)) if self.pool else torch.ones(len(keys))

    def ordered(self, out: BranchLogits) -> list[Tensor]:
        """The unimodal logits in the order of the weights."""
        unimodal: Any = out.unimodal
        if isinstance(unimodal, Mapping):
            if set(unimodal) == set(self.keys):
                return [unimodal[key] for key in self.keys]
        elif len(unimodal) == len(self.keys):
            return list(unimodal)
        got = list(unimodal) if isinstance(unimodal, Mapping) else len(unimodal)
        raise ValueError(f"unimodal: got {got}, expected the modalities {self.keys}")

    def parts(self, branches: list[Tensor], present: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """b and the evidence x_m - b_m of each branch (a pool: 0 and x_m), 0 where the modality is absent."""
        x = branches[0]
        shape = [1, -1] + [1] * (x.dim() - 2)
        base, own = self._biases()
        if base is None or own is None:
            base, evidence = x.new_zeros(()), branches
        else:
            evidence = [x - b.to(x).view(shape) for x, b in zip(branches, own, strict=True)]
            base = base.to(x).view(shape)
        if present is not None:
            evidence = [torch.where(p, x, 0.0) for x, p in zip(evidence, present, strict=True)]
        return base, evidence

    def _biases(self) -> tuple[Tensor | None, list[Tensor] | None]:
        """The bias b of a linear head's fused logits and b_m of each branch; None without one."""
        head, modalities = self.head, len(self.keys)
        if isinstance(head, ConcatHead) and head.bias is not None:
            own = head.bias / modalities if head.bias_mode == "split" else head.bias
            return head.bias, [own] * modalities
        if isinstance(head, SumHead) and head.layers[0].bias is not None:
            each: list[Any] = [layer.bias for layer in head.layers]
            return torch.stack(each).sum(0), each
        if isinstance(head, SharedHead) and head.layer.bias is not None:
            return modalities * head.layer.bias, [head.layer.bias] * modalities
        return None, None
