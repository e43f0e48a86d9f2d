"""Names, fields and constants that every implementation shares. Data only, and each fact stands here once.

csrc/finish.h has the same facts for the compiled kernels. The extension exports them, and importing it
compares.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TASKS = ("multiclass", "multilabel")
RULES = ("share", "paper", "constant", "none", "ogm")
DEPENDENCES = ("confidence", "logit_l1")
GAINS = ("residual", "mean_one", "plain")
REDUCTIONS = ("mean", "sum", "none")
FUSIONS = ("concat", "sum", "shared")
BIAS_MODES = ("full", "split")

FLOOR = 0.6  # the default floor of an entropy share, times the number of modalities
TINY_SHARE = 1e-12  # keeps 1 / share finite for entropy_floor=0
HUGE_RATIO = 1e30  # keeps Eq. 18's ratios finite: inf - inf would be NaN
CONSTANTS = {"FLOOR": FLOOR, "TINY_SHARE": TINY_SHARE, "HUGE_RATIO": HUGE_RATIO}

# Sums over the valid rows of a branch. Processes and chunks add these up before rules.finish.
SUMS = ("loss", "divisor", "count", "correct", "entropy", "dependence")


class BranchStats(NamedTuple):
    """Statistics of one call: detached tensors on the logits' device, float32 (float64 for float64 logits).

    Entries per branch [M+1] start with the fused branch. Entries per modality [M] follow the order of the
    unimodal logits. All are means over the branch's valid rows (target not ignored, modality present),
    whatever the reduction of the loss. Entropies are in nats. A modality that is absent from the whole batch
    has 0 everywhere and gain 1.

    Attributes:
        loss: [M+1] cross-entropy (the weighted mean of ``torch.nn.functional.cross_entropy`` with class
            weights).
        accuracy: [M+1] share of rows whose first largest logit is the target (soft targets: the target's
            largest).
        entropy: [M] mean entropy of the prediction, the modality's variance estimate.
        dependence: [M] mean true-class probability ("confidence") or sum of absolute logits ("logit_l1").
        inverse_variance: [M] the shares q, which sum to 1.
        dependence_share: [M] the shares d, which sum to 1.
        coefficients: [M] what the rule made of q and d; they sum to 1. For rule "none" uniform, and unused;
            for "ogm" the gains themselves.
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


# An implementation returns its statistics as one packed vector: the fields of BranchStats in order, then the
# link's gradient, gains - 1, then the sums [6, M+1]. The fields named here have M+1 entries, "sums" 6 (M+1),
# the others M.
PACKED = (*BranchStats._fields, "link", "sums")
PER_BRANCH = ("loss", "accuracy", "count")
