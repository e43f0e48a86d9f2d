"""BranchLogits, what a head returns and a loss takes, and the checks of everything that is given to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Unimodal = Mapping[str, Tensor] | Sequence[Tensor]


class BranchLogits(NamedTuple):
    """The M+1 predictions of one head for one batch.

    Attributes:
        fused: [B, C] or [B, C, d1, ...] logits of the whole model.
        unimodal: one logits tensor of the same shape per modality, as a dict by name or a sequence.
        link: what ``modulate`` returned, [M]; None where no gradient is to be scaled.
    """

    fused: Tensor
    unimodal: Unimodal
    link: Tensor | None = None


def as_branch_logits(output: object) -> BranchLogits:
    """BranchLogits from itself, a tuple (fused, unimodal[, link]) or a dict {"fused", name: ..., ["link"]}."""
    if isinstance(output, BranchLogits):
        return output
    # before Mapping, an abstract class, whose check takes a microsecond
    if isinstance(output, (tuple, list)) and len(output) in (2, 3) and not isinstance(output[1], Tensor):
        return BranchLogits(*output)
    if isinstance(output, Mapping):
        if "fused" not in output:
            raise ValueError(f'output: got a dict with the keys {list(output)}, expected "fused", the modalities and optionally "link"')
        unimodal = {name: x for name, x in output.items() if name not in ("fused", "link")}
        return BranchLogits(output["fused"], unimodal, output.get("link"))
    if isinstance(output, (tuple, list)):
        what = f"a {type(output).__name__} of {len(output)}: ({', '.join(type(o).__name__ for o in output)})"
    else:
        what = type(output).__name__
    raise TypeError(
        f"output: got {what}, expected BranchLogits(fused, unimodal, link), a tuple (fused, [x_1, ..., x_M], link) "
        'or a dict {"fused": ..., name: ..., "link": ...}'
    )


def check_not_dtensor(label: str, x: Tensor) -> None:
    """A DTensor's link and statistics would be each process's own while its values look like the whole batch's."""
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{label}: got a DTensor, expected this process's Tensor: pass .to_local(), for logits sharded over the batch with "
            "sync_stats=True, for logits sharded over the classes to arl_fast.distributed.sharded_arl_loss"
        )


def check_logits(fused: Tensor, unimodal: Unimodal, link: Tensor | None) -> tuple[Tensor, ...]:
    """All branches as a tuple, the fused one first, after checking type, dtype, shape, device and order."""
    if not isinstance(fused, Tensor):
        raise TypeError(f"fused: got {type(fused).__name__}, expected a Tensor of logits [B, C] or [B, C, d1, ...]")
    if isinstance(unimodal, Tensor) or not isinstance(unimodal, (Mapping, Sequence)):
        raise TypeError(f"unimodal: got {type(unimodal).__name__}, expected a dict or a sequence of logits, one per modality")
    if type(fused) is not Tensor:
        check_not_dtensor("fused", fused)
    if not fused.is_floating_point():
        raise TypeError(f"fused: got dtype {fused.dtype}, expected floating-point logits")
    if fused.dim() < 2 or fused.shape[1] == 0:
        raise ValueError(f"fused: got shape {list(fused.shape)}, expected [B, C] or [B, C, d1, ...] with C >= 1")
    names = list(unimodal) if isinstance(unimodal, Mapping) else range(len(unimodal))
    if len(names) == 0:
        raise ValueError("unimodal: got no logits, expected at least one modality")
    branches = [fused]
    for name in names:
        x = unimodal[name]  # type: ignore[index]
        label = f"unimodal[{name!r}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: got {type(x).__name__}, expected a Tensor of logits")
        if type(x) is not Tensor:
            check_not_dtensor(label, x)
        if x.shape != fused.shape:
            raise ValueError(f"{label}: got shape {list(x.shape)}, expected that of the fused logits, {list(fused.shape)}")
        if x.dtype != fused.dtype:
            raise TypeError(f"{label}: got dtype {x.dtype}, expected that of the fused logits, {fused.dtype}")
        if x.device != fused.device:
            raise ValueError(f"{label}: got device {x.device}, expected that of the fused logits, {fused.device}")
        branches.append(x)
    if link is not None:
        _check_link(link, names, fused)
    return tuple(branches)


def _check_link(link: Tensor, names: Sequence, fused: Tensor) -> None:
    if not isinstance(link, Tensor):
        raise TypeError(f"link: got {type(link).__name__}, expected the second result of arl_fast.modulate")
    if link.dim() != 1 or link.shape[0] == 0 or link.shape[0] % len(names):  # the links of several replicas may be concatenated
        raise ValueError(f"link: got shape {list(link.shape)}, expected [{len(names)}], one entry per modality")
    if link.device != fused.device:
        raise ValueError(f"link: got device {link.device}, expected that of the logits, {fused.device}")
    # modulate leaves the names on its link, so that features and logits in different order cannot swap their gains
    modalities = getattr(link, "modalities", None)
    if modalities is not None and not isinstance(names, range) and modalities != tuple(names):
        raise ValueError(f"unimodal: got the modalities {list(names)}, expected the order given to modulate, {list(modalities)}")


def check_target(target: Tensor, fused: Tensor) -> None:
    """Class indices [B, d1, ...] (int64, int32) or class probabilities of the shape of the logits."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected a Tensor of class indices or probabilities")
    if target.device != fused.device:
        raise ValueError(f"target: got device {target.device}, expected that of the logits, {fused.device}")
    if target.is_floating_point():
        if target.shape != fused.shape:
            raise ValueError(f"target: got probabilities of shape {list(target.shape)}, expected {list(fused.shape)}")
        if target.requires_grad:
            raise ValueError("target: got probabilities that require grad; the loss gives the target none, pass target.detach()")
    elif target.dtype in (torch.int64, torch.int32):
        expected = fused.shape[:1] + fused.shape[2:]
        if target.shape != expected:
            raise ValueError(f"target: got class indices of shape {list(target.shape)}, expected {list(expected)}")
    else:
        raise TypeError(f"target: got dtype {target.dtype}, expected int64 or int32 class indices, or floating-point probabilities")


def check_mask(mask: Tensor, fused: Tensor, modalities: int) -> None:
    """[B, M] bool, False where a modality is absent."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, expected a bool Tensor [B, M]")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected bool (True where the modality is present)")
    if mask.shape != (fused.shape[0], modalities):
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected [B, M] = [{fused.shape[0]}, {modalities}]")
    if mask.device != fused.device:
        raise ValueError(f"mask: got device {mask.device}, expected that of the logits, {fused.device}")


def check_weight(weight: Tensor, fused: Tensor) -> None:
    """[C] floating class weights."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a Tensor [C] of class weights")
    if not weight.is_floating_point():
        raise TypeError(f"weight: got dtype {weight.dtype}, expected floating point")
    if weight.shape != (fused.shape[1],):
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [C] = [{fused.shape[1]}]")
    if weight.device != fused.device:
        raise ValueError(f"weight: got device {weight.device}, expected that of the logits, {fused.device} (move the loss with .to())")
