"""``linear_arl_loss``: a linear head and the loss in one, without the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor

from ._autograd.linear import linear_loss_and_packed
from ._core.branches import Targets
from ._core.checks import LinearHead
from ._core.options import LossOptions, make_options, make_schedule, with_options
from ._core.spec import BranchStats
from ._core.stats import unpack

Tensors = Mapping[str, Tensor] | Sequence[Tensor]


@with_options
def linear_arl_loss(
    features: Tensors,
    weights: Tensor | Tensors,
    bias: Tensor | Tensors | None,
    target: Tensor,
    *,
    fusion: str = "concat",
    bias_mode: str = "full",
    chunk: int | None = None,
    return_logits: bool = False,
    gamma: float | Sequence[float] | Tensor = 1.0,
    temperature: float | Tensor | None = None,
    rule: str | Callable[[BranchStats], Tensor] = "share",
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    warming: bool | Tensor = False,
    sync_stats: bool | Any = False,
    **options: Unpack[LossOptions],
) -> Any:
    """A linear head and ``arl_loss`` in one, with no more than a chunk of the logits in memory at a time.

    Equal to ``arl_loss(*ConcatHead(...)(features), target)`` (SumHead for fusion "sum", SharedHead for
    "shared"). No ``modulate`` and no link: the features' gradients come out multiplied by their gains, those
    of the weights and biases do not. Autocast is followed as by ``torch.nn.functional.linear``.

    Args:
        features: [B, D_m] or, for dense predictions, [B, d1, ..., D_m] per modality; a dict by name or a
            sequence.
        weights: "concat": one matrix [C, sum D_m], or [C, D_m] per modality; "sum": [C, D_m] per modality;
            "shared": one [C, D]. Per modality means a sequence, or a dict with the features' keys.
        bias: [C], for fusion "sum" one per modality; None for none.
        target: class indices [B, d1, ...] (int64, int32) or class probabilities [B, C, d1, ...], as for
            ``arl_loss``.
        fusion: "concat" x_f = sum_m W_m z_m + b, or "sum", "shared": x_f = sum_m x_m with x_m = W_m z_m +
            b_m.
        bias_mode: for fusion "concat": "full", x_m = W_m z_m + b, or "split", x_m = W_m z_m + b / M.
        chunk: rows of logits that are held at once; None: as many as fit a memory budget.
        return_logits: also return all logits, detached; this takes the memory that chunks would save.
        gamma, temperature, rule, weight, mask, warming, sync_stats, dependence, entropy_floor, gain,
            ignore_index, label_smoothing, reduction: as for ``arl_loss``.

    Returns:
        loss: 0-d, or [B, d1, ...] for reduction "none"; float32 (float64 for float64 features).
        stats: BranchStats over all rows, whatever the chunks.
        logits: BranchLogits [B, C, d1, ...], detached and without a link; only with ``return_logits``.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
        IndexError: a class index out of range, on a CPU.

    Backward can be run once, or several times with ``retain_graph``; it has no second derivative. reduction
    "none", float16 and ``sync_stats`` compute the logits twice where they need several chunks.
    """
    loss, packed, logits = linear_loss_and_packed(
        LinearHead(features, weights, bias, fusion, bias_mode, chunk),
        Targets(target, mask, weight, pos_weight=pos_weight),
        make_schedule(gamma, temperature, warming, rule),
        make_options(rule=rule, **options),
        sync_stats,
        return_logits,
    )
    return (loss, unpack(packed), logits) if return_logits else (loss, unpack(packed))
