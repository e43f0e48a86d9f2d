"""Every check of an argument that is not an option. The general path enters here once, before it computes.

Each error names the argument, what came, and what was expected. ``csrc/eager`` serves usual calls without
these checks; whatever it does not accept comes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch, graph
from .branches import BranchLogits, Targets
from .dtypes import compute_dtype
from .options import Options, Schedule, check_choice, check_gamma, check_scalar
from .spec import BIAS_MODES, FUSIONS


def refuse_transforms(what: str) -> None:
    """Transforms of torch.func know nothing of the link, an edge between two autograd nodes."""
    if _torch.transforms_active():
        raise RuntimeError(
            f"{what}: called inside a transform of torch.func (grad, vmap, jvp, ...), which cannot carry the "
            "link from the loss to the encoders: use loss.backward() or torch.autograd.grad; for predictions "
            "alone, head.branches(features) returns the logits"
        )


def refuse_tracing(what: str) -> None:
    """torch.jit.trace sees torch's own operations only."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"{what}: called inside torch.jit.trace, which would record its result as a constant: trace "
            "predictions under torch.no_grad(), without the loss, or use torch.export"
        )


def check_not_dtensor(label: str, x: Tensor) -> None:
    """A DTensor looks like the whole batch, but its link and statistics would be each process's own."""
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{label}: got a DTensor, expected this process's Tensor: pass .to_local(), for logits sharded "
            "over the batch with sync_stats=True, for logits sharded over the classes to "
            "arl_fast.sharded.sharded_arl_loss"
        )


def describe(value: object) -> str:
    """A value in an error message: its type and what tells it apart."""
    if isinstance(value, Tensor):
        return f"a Tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


class FlatFeatures(NamedTuple):
    """The features given to ``modulate``, after the checks."""

    names: list[Any] | None  # None for a sequence
    tensors: list[Tensor]  # those of all modalities, in order
    sizes: tuple[int, ...]  # how many of them each modality has
    grouped: tuple[bool, ...]  # whether they came as a list, modality by modality

    def as_given(self, tensors: Sequence[Tensor]) -> dict[Any, Any] | list[Any]:
        """Other tensors, one for each of these, in the containers in which these came."""
        rest = iter(tensors)
        values: list[Any] = []
        for size, grouped in zip(self.sizes, self.grouped, strict=True):
            own = [next(rest) for _ in range(size)]
            values.append(own if grouped else own[0])
        return values if self.names is None else dict(zip(self.names, values, strict=True))


def check_features(features: Any) -> FlatFeatures:
    """What ``modulate`` takes: a floating-point tensor or a list of them per modality, all on one device."""
    if isinstance(features, (Tensor, str)) or not isinstance(features, (Mapping, Sequence)):
        raise TypeError(
            f"features: got {type(features).__name__}, expected a dict or a sequence of tensors, one per "
            "modality, or of lists of tensors"
        )
    names = list(features) if isinstance(features, Mapping) else None
    values = list(features.values()) if isinstance(features, Mapping) else list(features)
    if not values:
        raise ValueError("features: got none, expected at least one modality")
    labelled: dict[str, Any] = {}
    for name, value in zip(names or range(len(values)), values, strict=True):
        label = f"features[{name!r}]"
        if isinstance(value, (list, tuple)):
            if not value:
                raise ValueError(
                    f"{label}: got an empty {type(value).__name__}, expected at least one tensor"
                )
            labelled |= {f"{label}[{i}]": x for i, x in enumerate(value)}
        else:
            labelled[label] = value
    first = next(iter(labelled.values()))
    for label, x in labelled.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: got {type(x).__name__}, expected a Tensor")
        if type(x) is not Tensor:
            check_not_dtensor(label, x)
        if not x.is_floating_point():
            raise TypeError(f"{label}: got dtype {x.dtype}, expected floating point")
        if x.device != first.device:
            raise ValueError(
                f"{label}: got device {x.device}, expected that of the first modality, {first.device}"
            )
    grouped = tuple(isinstance(value, (list, tuple)) for value in values)
    sizes = tuple(len(value) if own else 1 for value, own in zip(values, grouped, strict=True))
    return FlatFeatures(names, list(labelled.values()), sizes, grouped)


class CheckedStep(NamedTuple):
    """What is known of a call of the loss after its checks."""

    # M+1, the fused ones first; for a linear head one stand-in for their shape and dtype
    logits: tuple[Tensor, ...]
    targets: Targets  # with class weights in the compute dtype
    schedule: Schedule


def check_loss(
    branches: BranchLogits, targets: Targets, schedule: Schedule, options: Options, shard: bool = False
) -> CheckedStep:
    """Everything that is given to ``arl_loss``; of a ``shard`` the logits are those of some classes only."""
    refuse_transforms("arl_loss")
    refuse_tracing("arl_loss")
    logits = _check_branches(branches)
    if options.task == "multiclass" and not shard:
        _check_classes(logits[0])
    targets, schedule = _check_targets_and_schedule(
        logits[0], len(logits) - 1, targets, schedule, options, shard
    )
    needs_link = options.scales and torch.is_grad_enabled() and any(x.requires_grad for x in logits)
    if branches.link is None and needs_link:  # doing nothing in silence is the classic failure
        raise ValueError(
            f"link: got None, but rule {options.rule!r} scales the encoders' gradients through it: pass the "
            "second result of arl_fast.modulate(features) (the heads of arl_fast do), or rule='none' for the "
            "losses alone"
        )
    return CheckedStep(logits, targets, schedule)


def _check_branches(branches: BranchLogits) -> tuple[Tensor, ...]:
    fused, unimodal, link = branches
    if not isinstance(fused, Tensor):
        raise TypeError(
            f"fused: got {type(fused).__name__}, expected a Tensor of logits [B, C] or [B, C, d1, ...]"
        )
    if isinstance(unimodal, Tensor) or not isinstance(unimodal, (Mapping, Sequence)):
        raise TypeError(
            f"unimodal: got {type(unimodal).__name__}, expected a dict or a sequence of logits, one per "
            "modality"
        )
    if type(fused) is not Tensor:
        check_not_dtensor("fused", fused)
    if not fused.is_floating_point():
        raise TypeError(f"fused: got dtype {fused.dtype}, expected floating-point logits")
    if fused.dim() < 2 or fused.shape[1] == 0:
        raise ValueError(
            f"fused: got shape {list(fused.shape)}, expected [B, C] or [B, C, d1, ...] with C >= 1"
        )
    names: Sequence[Any] = list(unimodal) if isinstance(unimodal, Mapping) else range(len(unimodal))
    if len(names) == 0:
        raise ValueError("unimodal: got no logits, expected at least one modality")
    logits = [fused]
    shape, dtype, device = fused.shape, fused.dtype, fused.device
    for name in names:
        x = unimodal[name]
        if type(x) is not Tensor or x.shape != shape or x.dtype != dtype or x.device != device:
            _check_like_fused(f"unimodal[{name!r}]", x, fused)
        logits.append(x)
    if link is not None:
        _check_link(link, names, fused)
    return tuple(logits)


def _check_like_fused(label: str, x: object, fused: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{label}: got {type(x).__name__}, expected a Tensor of logits")
    check_not_dtensor(label, x)
    if x.shape != fused.shape:
        raise ValueError(
            f"{label}: got shape {list(x.shape)}, expected that of the fused logits, {list(fused.shape)}"
        )
    if x.dtype != fused.dtype:
        raise TypeError(f"{label}: got dtype {x.dtype}, expected that of the fused logits, {fused.dtype}")
    if x.device != fused.device:
        raise ValueError(f"{label}: got device {x.device}, expected that of the fused logits, {fused.device}")


def _check_link(link: Tensor, names: Sequence, fused: Tensor) -> None:
    if not isinstance(link, Tensor):
        raise TypeError(f"link: got {type(link).__name__}, expected the second result of arl_fast.modulate")
    if not link.is_floating_point():
        raise TypeError(f"link: got dtype {link.dtype}, expected the second result of arl_fast.modulate")
    if (link.dim() != 1 or link.shape[0] != len(names)) and not graph.is_gathered(link, len(names)):
        raise ValueError(
            f"link: got shape {list(link.shape)}, expected [{len(names)}], one entry per modality. Give "
            "modulate several features of one modality as a list, {'audio': [a1, a2], 'visual': [v1, v2]}. A "
            "longer link is taken from DataParallel only, which joins the links of its replicas, and outside "
            "of torch.compile"
        )
    if link.device != fused.device:
        raise ValueError(f"link: got device {link.device}, expected that of the logits, {fused.device}")
    # modulate leaves the names on its link, so that features and logits in different order cannot swap their
    # gains
    modalities = getattr(link, "modalities", None)
    if modalities is not None and not isinstance(names, range) and modalities != tuple(names):
        raise ValueError(
            f"unimodal: got the modalities {list(names)}, expected the order given to modulate, "
            f"{list(modalities)}"
        )


def _check_targets_and_schedule(
    logits: Tensor,
    modalities: int,
    targets: Targets,
    schedule: Schedule,
    options: Options,
    shard: bool = False,
) -> tuple[Targets, Schedule]:
    """What comes with ``modalities`` + 1 tensors like ``logits``; class weights in the compute dtype."""
    if options.task == "multilabel":
        _check_labels(targets.target, logits)
    else:
        _check_target(targets.target, logits)
        if targets.target.is_floating_point() and not shard:
            _check_sums(targets.target)
    check_gamma(schedule.gamma, modalities)
    check_scalar("temperature", schedule.temperature)
    if options.rule == "paper" and modalities != 2:
        raise ValueError(
            f"rule: 'paper' (Eq. 18) is defined for two modalities, got {modalities}; "
            "'share' takes any number"
        )
    if targets.mask is not None:
        check_mask(targets.mask, logits, modalities)
    if targets.weight is not None:
        _check_weight("weight", targets.weight, logits)
        targets = targets._replace(weight=targets.weight.detach().to(compute_dtype(logits.dtype)))
    if targets.pos_weight is not None:
        if options.task != "multilabel":
            raise ValueError("pos_weight: got one with task='multiclass', expected task='multilabel'")
        _check_weight("pos_weight", targets.pos_weight, logits)
        targets = targets._replace(pos_weight=targets.pos_weight.detach().to(compute_dtype(logits.dtype)))
    return targets, _on_device(schedule, logits)


def _on_device(schedule: Schedule, logits: Tensor) -> Schedule:
    """Numbers stay numbers; tensors are on the logits' device and of the compute dtype."""
    gamma, temperature, warmup, step = schedule
    dtype, device = compute_dtype(logits.dtype), logits.device
    if isinstance(gamma, Tensor):
        gamma = gamma.to(device, dtype, non_blocking=True)
    elif isinstance(gamma, Sequence):
        gamma = tuple(float(value) for value in gamma)
    else:
        gamma = float(gamma)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(device, dtype, non_blocking=True)
    else:
        temperature = float(temperature)
    step = None if step is None else step.to(device, non_blocking=True)
    return Schedule(gamma, temperature, warmup, step)


def _check_is_tensor(target: object, logits: Tensor, expected: str) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected {expected}")
    if target.device != logits.device:
        raise ValueError(f"target: got device {target.device}, expected that of the logits, {logits.device}")


def _check_target(target: Tensor, logits: Tensor) -> None:
    """Class indices [B, d1, ...] (int64, int32) or class probabilities of the shape of the logits."""
    _check_is_tensor(target, logits, "a Tensor of class indices or probabilities")
    indices = logits.shape[:1] + logits.shape[2:]
    if target.is_floating_point():
        if target.shape == indices:
            raise TypeError(
                f"target: got dtype {target.dtype} in the shape of class indices, {list(indices)}: pass "
                "integers, target.long(), or class probabilities of the logits' shape"
            )
        if target.shape != logits.shape:
            raise ValueError(
                f"target: got probabilities of shape {list(target.shape)}, expected {list(logits.shape)}"
            )
        if target.requires_grad:
            raise ValueError(
                "target: got probabilities that require grad; the loss gives the target none, pass "
                "target.detach()"
            )
    elif target.dtype in (torch.int64, torch.int32):
        if target.shape != indices:
            several = "; for several labels per row pass target.float() and task='multilabel'"
            raise ValueError(
                f"target: got class indices of shape {list(target.shape)}, expected {list(indices)}"
                f"{several if target.shape == logits.shape else ''}"
            )
    else:
        raise TypeError(
            f"target: got dtype {target.dtype}, expected int64 or int32 class indices, or floating-point "
            "probabilities"
        )


# How far the sum of a row's class probabilities may be from 1: bfloat16 rounds each of them by up to 0.4 %,
# and the sum once more.
_SUM_TOLERANCE = 0.01


def _check_sums(target: Tensor) -> None:
    """Class probabilities sum to 1; zeros and ones for several labels per row would train something else.

    Checked on a CPU only, since looking stalls a GPU. A negative one may be meant: label smoothing below 0.
    """
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sums = target.sum(1)
    if sums.numel() == 0:
        return
    low, high = sums.aminmax()  # NaN if one of them is
    if not (low.item() >= 1 - _SUM_TOLERANCE and high.item() <= 1 + _SUM_TOLERANCE):
        wrong = ~((sums - 1).abs() <= _SUM_TOLERANCE)
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"target: got probabilities that sum to {float(sums[wrong][0]):.4g} (row {row}), expected a sum "
            "of 1 over the classes; for several labels per row pass task='multilabel', for weights of rows "
            "reduction='none'"
        )


def _check_classes(logits: Tensor) -> None:
    """One class is certain: the loss would be 0, and so would every gradient."""
    if logits.shape[1] == 1:
        raise ValueError(
            f"fused: got logits of shape {list(logits.shape)}, a single class, which is always right: for "
            "one yes or no per row pass task='multilabel' and targets of the logits' shape, for classes at "
            "least two logits"
        )


def _check_labels(target: Tensor, logits: Tensor) -> None:
    """Task "multilabel": a number in [0, 1], or NaN where it is not known, for every logit."""
    _check_is_tensor(target, logits, "a Tensor of the logits' shape, in [0, 1]")
    if not target.is_floating_point():
        raise TypeError(
            f"target: got dtype {target.dtype}, expected floating-point labels in [0, 1] for "
            "task='multilabel': pass target.float()"
        )
    if target.shape != logits.shape:
        raise ValueError(
            f"target: got labels of shape {list(target.shape)}, expected that of the logits, "
            f"{list(logits.shape)}"
        )
    if target.requires_grad:
        raise ValueError(
            "target: got labels that require grad; the loss gives them none, pass target.detach()"
        )
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (target < 0) | (target > 1)  # NaN is neither
        if bool(wrong.any()):
            raise ValueError(
                f"target: got {float(target[wrong][0])}, expected labels in [0, 1], or NaN for unknown ones"
            )


def check_class_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """A class index out of range is an error on a CPU. On a GPU looking would stall: the row becomes NaN."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        value = int(target[bad][0])
        raise IndexError(
            f"target: got class {value}, expected 0 <= target < {classes} or ignore_index={ignore_index}"
        )


def check_mask(mask: Tensor, like: Tensor, modalities: int) -> None:
    """[B, M] bool, False where a modality is absent, for a batch of logits or features."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, expected a bool Tensor [B, M]")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected bool (True where the modality is present)")
    if mask.shape != (like.shape[0], modalities):
        raise ValueError(
            f"mask: got shape {list(mask.shape)}, expected [B, M] = [{like.shape[0]}, {modalities}]"
        )
    if mask.device != like.device:
        raise ValueError(f"mask: got device {mask.device}, expected that of the batch, {like.device}")


def _check_weight(name: str, weight: Tensor, logits: Tensor) -> None:
    """[C] floating weights of the classes or labels."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: got {type(weight).__name__}, expected a Tensor [C] of weights")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: got dtype {weight.dtype}, expected floating point")
    if weight.shape != (logits.shape[1],):
        raise ValueError(f"{name}: got shape {list(weight.shape)}, expected [C] = [{logits.shape[1]}]")
    if weight.device != logits.device:
        advice = "(move the loss with .to())"
        raise ValueError(
            f"{name}: got device {weight.device}, expected that of the logits, {logits.device} {advice}"
        )


# ---- linear heads ----------------------------------------------------------------------------------------


class LinearHead(NamedTuple):
    """A linear head's tensors and what they mean, as ``linear_arl_loss`` takes them."""

    features: Any
    weights: Any
    bias: Any
    fusion: str = "concat"
    bias_mode: str = "full"
    chunk: int | None = None


class CheckedHead(NamedTuple):
    """The tensors of a linear head as sequences, after the checks."""

    features: list[Tensor]
    weights: list[Tensor]  # one matrix, or one per modality
    biases: list[Tensor]  # none, one, or one per modality


def check_linear_loss(
    head: LinearHead, dtype_of: Any, targets: Targets, schedule: Schedule, options: Options
) -> tuple[CheckedHead, CheckedStep]:
    """Everything that is given to ``linear_arl_loss``. ``dtype_of(features)`` is the dtype of the logits."""
    refuse_transforms("linear_arl_loss")
    refuse_tracing("linear_arl_loss")
    check_choice("fusion", head.fusion, FUSIONS)
    check_choice("bias_mode", head.bias_mode, BIAS_MODES)
    chunk = head.chunk
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk: got {chunk!r}, expected a number of rows >= 1, or None for a memory budget")
    tensors = _check_head(head)
    first = tensors.features[0]
    batch, *positions = first.shape[:-1]
    shape = (batch, tensors.weights[0].shape[0], *positions)
    like = torch.empty((), dtype=dtype_of(first), device=first.device).expand(shape)
    if options.task == "multiclass":
        _check_classes(like)
    targets, schedule = _check_targets_and_schedule(like, len(tensors.features), targets, schedule, options)
    return tensors, CheckedStep((like,), targets, schedule)


def _of_modalities(argument: str, value: object, names: Sequence[Any]) -> dict[str, Any]:
    """One tensor per modality as {label: tensor} in the features' order."""
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ValueError(
                f"{argument}: got {describe(value)}, expected those of the features, {list(names)}"
            )
        return {f"{argument}[{key!r}]": value[key] for key in names}
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(
            f"{argument}: got {describe(value)}, expected a dict or a sequence of tensors, one per modality"
        )
    if len(value) != len(names):
        raise ValueError(
            f"{argument}: got {len(value)} tensors, expected one for each of the {len(names)} modalities"
        )
    return {f"{argument}[{i}]": x for i, x in enumerate(value)}


def _check_shape(label: str, value: Any, shape: tuple[int | None, ...], expected: str) -> None:
    error = ValueError if isinstance(value, Tensor) else TypeError
    fits = isinstance(value, Tensor) and value.dim() == len(shape)
    if not fits or any(
        want is not None and got != want for got, want in zip(value.shape, shape, strict=True)
    ):
        raise error(f"{label}: got {describe(value)}, expected {expected}")


def _check_features(features: Any) -> tuple[Sequence[Any], dict[str, Tensor]]:
    """The modalities' names or positions, and their features by label."""
    if isinstance(features, Tensor) or not isinstance(features, (Mapping, Sequence)) or len(features) == 0:
        raise TypeError(
            f"features: got {describe(features)}, expected a dict or a sequence of tensors [B, D_m], one per "
            "modality"
        )
    names: Sequence[Any] = list(features) if isinstance(features, Mapping) else range(len(features))
    z = _of_modalities("features", features, names)
    first = next(iter(z.values()))
    for label, x in z.items():
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[:-1] != first.shape[:-1]:
            batch = list(first.shape[:-1]) if isinstance(first, Tensor) and first.dim() > 1 else ["B"]
            error = ValueError if isinstance(x, Tensor) else TypeError
            raise error(
                f"{label}: got {describe(x)}, expected [{', '.join(map(str, batch))}, D_m] as of all "
                "modalities"
            )
    return names, z


def _check_head(head: LinearHead) -> CheckedHead:
    names, z = _check_features(head.features)
    fusion, weights, bias = head.fusion, head.weights, head.bias
    sizes = [x.shape[-1] for x in z.values()]
    if fusion == "shared" and len(set(sizes)) > 1:
        raise ValueError(f"features: fusion 'shared' needs one feature size for all modalities, got {sizes}")

    w: dict[str, Any] = {"weights": weights}
    if fusion == "shared":
        _check_shape("weights", weights, (None, sizes[0]), f"[C, {sizes[0]}] for fusion 'shared'")
    elif fusion == "concat" and isinstance(weights, Tensor):
        total = sum(sizes)
        _check_shape(
            "weights", weights, (None, total), f"[C, {total}], the columns of all modalities in order"
        )
    else:
        w = _of_modalities("weights", weights, names)
        for (label, x), size in zip(w.items(), sizes, strict=True):
            _check_shape(label, x, (None, size), f"[C, {size}]")
    classes = next(iter(w.values())).shape[0]
    for label, x in w.items():
        _check_shape(label, x, (classes, None), f"C = {classes} rows, as the first")
    b: dict[str, Any] = {}
    if bias is not None:
        b = _of_modalities("bias", bias, names) if fusion == "sum" else {"bias": bias}
    for label, x in b.items():
        _check_shape(label, x, (classes,), f"[C] = [{classes}]")

    _check_alike(z | w | b)
    return CheckedHead(list(z.values()), list(w.values()), list(b.values()))


def _check_alike(tensors: Mapping[str, Tensor]) -> None:
    """One device and, without autocast, one floating dtype, as of the first modality's features."""
    first = next(iter(tensors.values()))
    autocast = torch.is_autocast_enabled(first.device.type) and all(
        x.dtype != torch.float64 for x in tensors.values()
    )
    expected = "expected that of the first modality's features"
    for label, x in tensors.items():
        check_not_dtensor(label, x)
        if x.device != first.device:
            raise ValueError(f"{label}: got device {x.device}, {expected}, {first.device}")
        if not x.is_floating_point():
            raise TypeError(f"{label}: got dtype {x.dtype}, expected floating point")
        if x.dtype != first.dtype and not autocast:
            raise TypeError(f"{label}: got dtype {x.dtype}, {expected}, {first.dtype}, or torch.autocast")
