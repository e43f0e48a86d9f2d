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

from ._core.branches import as_branch_logits, mask_of
from ._fusion.fit import fit_weights
from ._fusion.formula import Formula
from ._fusion.report import FusionReport, make_report
from ._fusion.rows import Rows, as_batches
from .heads import ConcatHead, SharedHead, SumHead, ZeroedHead, is_plain_linear
from .loss import ARLLoss


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
        formula = Formula(head, modalities)
        self._formula = formula
        self.names = formula.names
        self.register_buffer("weights", formula.plain.clone())
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
        task: str = "multiclass",
        pos_weight: Tensor | None = None,
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
            target: class indices [B, d1, ...] or probabilities of the shape of the logits; for task
                "multilabel" labels of that shape in [0, 1], NaN where one is not known.
            method: "branch" or "joint".
            mask: [B, M] of bool, False where a modality is absent; None: the one that came with the output.
            weight: [C] class weights of the cross-entropy, or weights of the labels.
            ignore_index: a class that is left out.
            guard: how many times the noise is taken off; None or 0: the fitted weights as they are.
            task: that of the loss. For "multilabel" the binary cross-entropy over all pairs of a row and a
                label takes the place of the cross-entropy, and in the report the pairs that of the rows.
                Standard errors take rows for independent, not the labels of a row.
            pos_weight: [C] for task "multilabel": what multiplies the loss of a "yes".

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
        formula = self._formula
        criterion = ARLLoss(
            rule="none", weight=weight, ignore_index=ignore_index, task=task, pos_weight=pos_weight
        )
        rows = Rows(formula, batches, criterion)
        method = "joint" if formula.pool else method
        fit = fit_weights(rows, method, formula.plain.double(), float(guard or 0), formula.pool)
        fused = first[0].fused
        self.weights = fit.weights[-1].to(fused.device, torch.promote_types(fused.dtype, torch.float32))
        self.report = make_report(formula, rows, fit, method)
        if self.report.over_best.mean < -2 * self.report.over_best.error:
            warnings.warn(f"FusionWeights: {self.report.verdict}", stacklevel=2)
        return self

    def forward(self, out: Any, mask: Tensor | None = None) -> Tensor:
        """BranchLogits -> weighted logits of their shape; each row from the modalities that it has.

        With a mask [B, M], given or come with the output, a linear head's logits are b plus the evidence of
        the modalities that are present, whatever the features of the absent ones were. A pool leaves their
        branches out, not the fused one.
        """
        if mask is None:
            mask = mask_of(out)
        out = as_branch_logits(out)
        branches = self._formula.ordered(out)
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
        base, evidence = self._formula.parts([x.to(dtype) for x in branches], present)
        if self._formula.pool:
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
            TypeError: for a head that is not linear, or whose layers are wrapped or parametrised.
        """
        head = self._formula.head
        if isinstance(head, SharedHead):
            _writable_weight(head.layer)
            features = dict(zip(head.names, head.dims, strict=True)) if head.names else head.dims
            own = SumHead(features, head.layer.out_features, bias=head.layer.bias is not None)
            own.to(head.layer.weight).train(head.training)
            for layer, w in zip(own.layers, self.weights.tolist(), strict=True):
                layer.load_state_dict(head.layer.state_dict())
                layer.weight.mul_(w)  # type: ignore[operator, union-attr]
            return own
        if isinstance(head, ConcatHead):
            pieces = _writable_weight(head.linear).split(head.dims, 1)
        elif isinstance(head, SumHead):
            pieces = [_writable_weight(layer) for layer in head.layers]
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
        names = ["fused", *self.names] if self._formula.pool else self.names
        return ", ".join(f"{name}={w:.3g}" for name, w in zip(names, self.weights.tolist(), strict=True))


def _writable_weight(layer: nn.Module) -> nn.Parameter:
    """The weight of a layer that computes W z + b with it and nothing else, and can be written to."""
    weight = layer._parameters.get("weight")
    if weight is None or not is_plain_linear(layer, weight):
        raise TypeError(
            f"head: got a {type(layer).__name__} in the head, whose weight alone does not tell what it "
            "computes: keep calling this FusionWeights, or merge the layer into an nn.Linear"
        )
    return weight
