"""Fusion weights (docs/fusion.md) of a trained model, fitted on validation data."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

import arl_fast

from .models.build import AuxiliaryHead


def weighted(
    head: nn.Module | None, logits: dict[str, dict[str, Tensor]], targets: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """The weighted test logits [n, C], and the weights by modality (of a pool, "fused" first).

    Args:
        head: the model's; None for encoders trained apart, whose logits are added.
        logits: split -> branch -> [n, C], for "validation" and "test".
        targets: split -> [n].
    """
    out = {}
    for split, branches in logits.items():
        out[split] = arl_fast.BranchLogits(
            branches["fused"], {name: x for name, x in branches.items() if name != "fused"}
        )
    names = [name for name in logits["test"] if name != "fused"]
    if head is None:
        head = arl_fast.SumHead(dict.fromkeys(names, 1), out["test"].fused.shape[1], bias=False)
    elif isinstance(head, AuxiliaryHead):
        head = None  # its unimodal logits are no parts of the fused ones: a pool of all predictions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a branch alone is better, the table shows
        fusion = arl_fast.FusionWeights.fit(head, out["validation"], targets["validation"])
    values = fusion.weights.tolist()
    shown = names if len(values) == len(names) else ["fused", *names]
    return fusion(out["test"]).detach(), {name: round(w, 3) for name, w in zip(shown, values, strict=True)}
