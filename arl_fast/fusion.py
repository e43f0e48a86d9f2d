"""Fusion weights: how loudly each modality speaks in the fused prediction, fitted on held-out rows.

The paper's theorem asks for a prediction that depends on each modality in inverse proportion to its
variance. The temperature of a branch on rows that the model was not trained on is such a variance.
docs/fusion.md has the derivation, and what the weights gain.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._fusion.fit import fit_weights
from ._fusion.report import FusionReport, make_report
from ._fusion.rows import Rows, as_batches
from .branches import BranchLogits, as_branch_logits
from .heads import BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead

LINEAR = (ConcatHead, SumHead, SharedHead)
POOLED = (GatedHead, BilinearHead, ZeroedHead)


class FusionWeights(nn.Module):
    """One weight per modality of the fused prediction: x_f = b + sum_m w_m (x_m - b_m).

    b_m is the part of branch m's logits that is the head's bias, b that of the fused logits, so that
    weights of 1 give the plain fused logits, bit for bit. A head that is not linear (GatedHead,
    BilinearHead, ZeroedHead, or None for one of your own) gets a log-linear pool of its M+1 predictions,
    w_0 x_f + sum_m w_m x_m; there (1, 0, ..., 0) are the plain weights.

    Made by ``FusionWeights.fit``; or from a head, with the plain weights, to load a state_dict into.

    Args:
        head: the head whose logits are weighted. It is referred to, not registered: the state_dict has the
            weights alone.
        modalities: names or number of the modalities, where the head does not know them (ZeroedHead, None).

    Attributes:
        weights: [M], for a pool [M+1], the fused prediction's first; >= 0; float64 for float64 logits, else
            float32.
        names: of the modalities, in the order of the weights.
        report: FusionReport of the fit; None without one.
    """

    weights: Tensor

    def __init__(self, head: nn.Module | None, modalities: Sequence[str] | int | None = None) -> None:
        super().__init__()
        if head is not None and not isinstance(head, LINEAR + POOLED):
            raise TypeError(
                f"head: got {type(head).__name__}, expected the head itself, not what contains it: "
                "ConcatHead, SumHead or SharedHead for a weight per modality; GatedHead, BilinearHead, "
                "ZeroedHead or, for a head of your own, None for a pool of the predictions"
            )
        known = None if head is None or isinstance(head, ZeroedHead) else head.names or len(head.dims)
        given = list(range(modalities)) if isinstance(modalities, int) else modalities
        names = list(range(known)) if isinstance(known, int) else known or given
        if not names:
            raise ValueError(
                "modalities: got none, expected their names or their number, which this head does not know"
            )
        if given is not None and list(given) != list(names):
            raise ValueError(f"modalities: got {list(given)}, expected those of the head, {list(names)}")
        self._keys: list[Any] = list(names)
        self._head = [head]  # in a list: not registered
        self.names = [str(name) for name in names]
        self.pool = not isinstance(head, LINEAR)
        self.register_buffer("weights", self._plain())
        self.report: FusionReport | None = None

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        head: nn.Module | None,
        out: Any,
        target: Tensor | None = None,
        method: str = "branch",
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        guard: float | None = 1.25,
    ) -> FusionWeights:
        """Weights from held-out rows: rows that neither the encoders nor the head were trained on.

        "branch" gives modality m the inverse temperature of its own branch, the minimiser over w of CE(w
        x_m, y) + 0.01 (log w)^2. "joint" minimises the cross-entropy of the weighted sum over w >= 0, with
        a ridge of 0.001 (w - 1)^2 per weight: freer, and worse with few rows. A pool is always fitted
        jointly, with the ridge towards the plain weights.

        The guard shrinks the weights towards each other, since part of their differences is noise. These
        are multiplied by max(0, 1 - guard * N / S): S is their sum of squares (for "branch" of log w around
        its mean; else in the metric of the Hessian), N the part of S to be expected from a finite number of
        rows alone. Where that is 0, all weights are 1 (a pool: the plain ones).

        Deterministic, in float64, with at most 20 passes over the rows.

        Args:
            head: what made the logits: a head of this package; None for another one.
            out: BranchLogits of the held-out rows, logits [B, C] or [B, C, d1, ...]; or, without a target, an
                iterable of (BranchLogits, target) or (BranchLogits, target, mask), which may be larger than
                memory. It yields the same rows in the same order each time (no shuffling). A generator, which
                can do so only once, is kept in memory.
            target: class indices [B, d1, ...] or probabilities of the shape of the logits.
            method: "branch" or "joint".
            mask: [B, M] of bool, False where a modality is absent.
            weight: [C] class weights of the cross-entropy.
            ignore_index: a target that is left out.
            guard: how many times the noise is taken off; None or 0: the fitted weights as they are.

        Raises:
            TypeError, ValueError: what the loss refuses, no row with a target, logits that are not finite, an
                iterable that changes.

        Warns:
            UserWarning: where a branch alone beats the weighted whole by more than two standard errors.
        """
        if method not in ("branch", "joint"):
            raise ValueError(f"method: got {method!r}, expected 'branch' or 'joint'")
        if guard is not None and (not isinstance(guard, (int, float)) or not 0 <= guard < math.inf):
            raise ValueError(f"guard: got {guard!r}, expected a number >= 0 or None")
        batches = as_batches(out, target, mask)
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("out: got an empty iterable, expected batches of (BranchLogits, target)")
        unimodal = first[0].unimodal
        modalities = list(unimodal) if isinstance(unimodal, Mapping) else len(unimodal)
        self = cls(head, modalities if head is None or isinstance(head, ZeroedHead) else None)
        rows = Rows(self, batches, weight, ignore_index)
        method = "joint" if self.pool else method
        fit = fit_weights(rows, method, self._plain().double(), float(guard or 0), self.pool)
        fused = first[0].fused
        self.weights = fit.weights[-1].to(fused.device, torch.promote_types(fused.dtype, torch.float32))
        self.report = make_report(self, rows, fit, method)
        if self.report.over_best.mean < -2 * self.report.over_best.error:
            warnings.warn(f"FusionWeights: {self.report.verdict}", stacklevel=2)
        return self

    def forward(self, out: Any, mask: Tensor | None = None) -> Tensor:
        """BranchLogits -> weighted logits of their shape; each row from the modalities that it has.

        With a mask [B, M], a linear head's logits are b plus the evidence of the modalities that are present,
        whatever the features of the absent ones were. A pool leaves their branches out, not the fused one.
        """
        out = as_branch_logits(out)
        branches = self._ordered(out)
        dtype = torch.promote_types(out.fused.dtype, torch.float32)
        weights = self.weights.to(dtype)
        shape = [-1] + [1] * (out.fused.dim() - 1)
        present = None
        if mask is not None:
            expected = [len(out.fused), len(branches)]
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != expected:
                got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"mask: got {got}, expected bool [B, M] = {expected}")
            present = [column.view(shape) for column in mask.unbind(1)]
        base, evidence = self._parts([x.to(dtype) for x in branches], present)
        if self.pool:
            total = weights[0] * out.fused.to(dtype)
            for w, x in zip(weights[1:], evidence, strict=True):
                total = total + w * x
            return total.to(out.fused.dtype)
        total = out.fused.to(dtype)
        if mask is not None:  # nothing of an absent modality's features, which may be anything
            total = torch.where(mask.all(1).view(shape), total, base + sum(evidence[1:], evidence[0]))
        for w, x in zip(weights, evidence, strict=True):
            total = total + (w - 1) * x
        return total.to(out.fused.dtype)

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Multiply the weights into the head's parameters, and return the head: nothing is left to compute.

        A ConcatHead and a SumHead are changed in place, and the weights here become 1, since the head has
        them now. A SharedHead has one layer for all modalities and cannot hold different weights: it stays
        as it is, and what is returned is a SumHead with the weights in it. The unimodal branches change
        too, to b_m + w_m (x_m - b_m).

        Raises:
            TypeError: for a head that is not linear.
        """
        head = self._head[0]
        if isinstance(head, SharedHead):
            features = dict(zip(head.names, head.dims, strict=True)) if head.names else head.dims
            own = SumHead(features, head.layer.out_features, bias=head.layer.bias is not None)
            own.to(head.layer.weight).train(head.training)
            for layer, w in zip(own.layers, self.weights.tolist(), strict=True):
                layer.load_state_dict(head.layer.state_dict())
                layer.weight.mul_(w)  # type: ignore[operator, union-attr]
            return own
        if isinstance(head, ConcatHead):
            pieces = head.weight.split(head.dims, 1)
        elif isinstance(head, SumHead):
            pieces = [layer.weight for layer in head.layers]
        else:
            raise TypeError(
                f"head: got {type(head).__name__}, expected ConcatHead, SumHead or SharedHead: a pool has no "
                "parameters to fold its weights into"
            )
        for piece, w in zip(pieces, self.weights, strict=True):
            piece.mul_(w)
        self.weights.fill_(1)
        return head

    def extra_repr(self) -> str:
        names = ["fused", *self.names] if self.pool else self.names
        return ", ".join(f"{name}={w:.3g}" for name, w in zip(names, self.weights.tolist(), strict=True))

    def _plain(self) -> Tensor:
        return torch.tensor([1.0] + [0.0] * len(self._keys)) if self.pool else torch.ones(len(self._keys))

    def _ordered(self, out: BranchLogits) -> list[Tensor]:
        """The unimodal logits in the order of the weights."""
        unimodal = out.unimodal
        named = isinstance(unimodal, Mapping)
        if (set(unimodal) != set(self._keys)) if named else (len(unimodal) != len(self._keys)):
            got = list(unimodal) if named else len(unimodal)
            raise ValueError(f"unimodal: got {got}, expected the modalities {self._keys}")
        return [unimodal[key] for key in self._keys] if named else list(unimodal)  # type: ignore[arg-type]

    def _parts(self, branches: list[Tensor], present: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """b, and each branch's evidence x_m - b_m (a pool: 0 and x_m), 0 where the modality is absent."""
        base, own = _biases(self._head[0], len(branches))
        x = branches[0]
        shape = [1, -1] + [1] * (x.dim() - 2)
        if base is None or own is None:
            base, evidence = x.new_zeros(()), branches
        else:
            evidence = [x - b.to(x).view(shape) for x, b in zip(branches, own, strict=True)]
            base = base.to(x).view(shape)
        if present is not None:
            evidence = [torch.where(p, x, 0.0) for x, p in zip(evidence, present, strict=True)]
        return base, evidence


def _biases(head: nn.Module | None, modalities: int) -> tuple[Tensor | None, list[Tensor] | None]:
    """The bias b of a linear head's fused logits and b_m of each branch; None without one."""
    if isinstance(head, ConcatHead) and head.bias is not None:
        own = head.bias / modalities if head.bias_mode == "split" else head.bias
        return head.bias, [own] * modalities
    if isinstance(head, SumHead) and head.layers[0].bias is not None:
        each = [layer.bias for layer in head.layers]
        return torch.stack(each).sum(0), each  # type: ignore[arg-type, return-value]
    if isinstance(head, SharedHead) and head.layer.bias is not None:
        return modalities * head.layer.bias, [head.layer.bias] * modalities
    return None, None
