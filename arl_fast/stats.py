"""BranchStats, what a step tells about itself, and the one packed vector in which every implementation returns it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BranchStats(NamedTuple):
    """Statistics of one call: detached tensors on the logits' device, float32 (float64 for float64 logits).

    Per-branch entries [M+1] start with the fused branch; per-modality entries [M] follow the order of the unimodal
    logits. All are means over the branch's valid rows (target not ignored, modality present), whatever the reduction
    of the loss; entropies are in nats. A modality absent from the whole batch has 0 everywhere and gain 1.

    Attributes:
        loss: [M+1] cross-entropy (the weighted mean of ``torch.nn.functional.cross_entropy`` with class weights).
        accuracy: [M+1] share of rows whose first largest logit is the target (soft targets: the target's largest).
        entropy: [M] mean entropy of the prediction, the modality's variance estimate.
        dependence: [M] mean true-class probability ("confidence") or sum of absolute logits ("logit_l1").
        inverse_variance: [M] the shares q, which sum to 1.
        dependence_share: [M] the shares d, which sum to 1.
        coefficients: [M] what the rule made of q and d; they sum to 1. For rule "none" uniform, and unused.
        gains: [M] the factor on the gradient that reaches each encoder in this step.
        count: [M+1] number of valid rows.
    """

    loss: Tensor
    accuracy: Tensor
    entropy: Tensor
    dependence: Tensor
    inverse_variance: Tensor
    dependence_share: Tensor
    coefficients: Tensor
    gains: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is shadowed on purpose


# The packed vector: the fields of BranchStats in order, then `gains - 1` (what backward hands to the link), then the
# raw sums [6, M+1] that several processes or chunks add up before rules.finish.
SUMS = ("loss", "norm", "count", "correct", "entropy", "dependence")


def packed_sizes(modalities: int) -> list[int]:
    """Lengths of the pieces of the packed vector: nine statistics, the link's gradient, the sums."""
    branches = modalities + 1
    return [branches, branches] + [modalities] * 6 + [branches, modalities, len(SUMS) * branches]


def packed_length(modalities: int) -> int:
    return 16 * modalities + 9


def unpack(packed: Tensor) -> BranchStats:
    """[16M+9] -> BranchStats, which share its memory."""
    # unsafe: without the records that make autograd see a write into a view, and half as expensive for it
    return BranchStats(*packed.unsafe_split_with_sizes(packed_sizes((packed.shape[0] - 9) // 16))[:9])


def link_gradient(packed: Tensor) -> Tensor:
    """[16M+9] -> gains - 1, [M]."""
    modalities = (packed.shape[0] - 9) // 16
    return packed.narrow(0, 9 * modalities + 3, modalities)


def unpack_sums(packed: Tensor) -> Tensor:
    """[16M+9] -> the raw sums [6, M+1], rows as in SUMS."""
    modalities = (packed.shape[0] - 9) // 16
    return packed[10 * modalities + 3 :].view(len(SUMS), modalities + 1)
