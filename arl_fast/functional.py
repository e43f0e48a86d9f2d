"""``modulate`` and ``arl_loss``: two small autograd Functions and the link between them (docs/method.md, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from . import dispatch, rules
from .branches import Unimodal, check_logits, check_mask, check_not_dtensor, check_target, check_weight
from .options import Options, check_scalar, make_options
from .reference import compute_dtype
from .stats import BranchStats, link_gradient, unpack

# _transformed: whether a transform of torch.func runs. _graph_is_kept: whether this backward may not hand out the saved gradients
# themselves, because under retain_graph they must survive it.
_transformed: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is computed from any of these.

    A Function is applied only then: elsewhere torch.compile calls ``forward`` itself, and drops its ``ctx`` where the number
    of arguments happens to be that of the parameters, ``*varargs`` counted as one (torch 2.13).
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _new_link(features: Sequence[Tensor]) -> Tensor:
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in features) else torch.float32
    return torch.zeros(len(features), dtype=dtype, device=features[0].device)


class _Modulate(torch.autograd.Function):
    """Identity on the features; the gradient of the extra output, the link, is what scales theirs in backward."""

    @staticmethod
    def forward(ctx: Any, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return (*(z.view_as(z) for z in features), _new_link(features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *features, link = grads
        if link is None:  # no loss has used the link
            return tuple(features)
        first = next((g for g in features if g is not None), None)
        if first is None:
            return tuple(features)
        return tuple(dispatch.for_tensor(first).modulate_backward(features, link))


@overload
def modulate(features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]: ...
@overload
def modulate(features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]: ...
def modulate(features: Mapping[str, Tensor] | Sequence[Tensor]) -> tuple[dict[str, Tensor] | list[Tensor], Tensor]:
    """Mark the point at which the gradient of each modality's encoder is to be scaled.

    The features come back unchanged. Give the link to the loss that is computed from them: in backward the gradient
    that reaches modality m through its features is then multiplied by the gain of the same step (Eq. 19 of the paper).
    A link that no loss uses is harmless.

    Args:
        features: one floating-point tensor of any shape per modality, all on one device; a dict by name or a sequence.

    Returns:
        The features, in a dict or a list as they came, and the link, a zero vector [M] of float32 (float64 if any
        feature is float64). Where several losses use one link, their gains minus one add up.

    Raises:
        TypeError, ValueError: not a dict or sequence of floating-point tensors, none given, or several devices.
    """
    if isinstance(features, Tensor) or not isinstance(features, (Mapping, Sequence)):
        raise TypeError(f"features: got {type(features).__name__}, expected a dict or a sequence of tensors, one per modality")
    names: Sequence[Any] = list(features) if isinstance(features, Mapping) else range(len(features))
    if len(names) == 0:
        raise ValueError("features: got none, expected at least one modality")
    tensors = [features[name] for name in names]
    for name, z in zip(names, tensors, strict=True):
        if not isinstance(z, Tensor):
            raise TypeError(f"features[{name!r}]: got {type(z).__name__}, expected a Tensor")
        if type(z) is not Tensor:
            check_not_dtensor(f"features[{name!r}]", z)
        if not z.is_floating_point():
            raise TypeError(f"features[{name!r}]: got dtype {z.dtype}, expected floating point")
        if z.device != tensors[0].device:
            raise ValueError(f"features[{name!r}]: got device {z.device}, expected that of the first modality, {tensors[0].device}")
    refuse_transforms("modulate")
    native = dispatch.native_steps()
    result = None if native is None else native.fast_modulate(tensors)
    if result is not None:
        tensors, link = result
    elif recorded(tensors):
        *tensors, link = _Modulate.apply(*tensors)
    else:
        link = _new_link(tensors)
    if isinstance(features, Mapping):
        if not torch.compiler.is_compiling():
            link.modalities = tuple(names)
        return dict(zip(names, tensors, strict=True)), link
    return list(tensors), link


def _compute(
    implementation: ModuleType,
    options: Options,
    schedule: rules.Schedule,
    group: Any,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    logits: Sequence[Tensor],
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
    """The loss in its final shape, the packed statistics, the factor on the gradients and the gradients of the rows."""
    norm, local_options = None, options
    if group is not None:  # `synchronise` divides by the norm of all processes, and runs a callable rule, once
        norm = torch.ones(len(logits), dtype=compute_dtype(logits[0].dtype), device=logits[0].device)
        local_options = options if isinstance(options.rule, str) else options._replace(rule="constant")
    loss, packed, grads = implementation.forward(
        [_to_rows(x) for x in logits],
        _to_rows(target) if target.is_floating_point() else target.reshape(-1),
        _mask_rows(mask, logits[0]),
        weight,
        norm,
        schedule,
        local_options,
        grad,
    )
    factor = None
    if group is not None:
        from .distributed import synchronise

        loss, packed, factor = synchronise(loss, packed, schedule, options, group, norm)
    if options.reduction == "none":
        loss = loss.view(logits[0].shape[:1] + logits[0].shape[2:])
    return loss, packed, factor, grads


class _ARLLoss(torch.autograd.Function):
    """Loss and packed statistics; the gradients of the logits are written in forward and handed out in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        implementation: ModuleType,
        options: Options,
        schedule: rules.Schedule,
        group: Any,
        target: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        link: Tensor | None,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        grad = any(ctx.needs_input_grad[8:])
        loss, packed, factor, grads = _compute(implementation, options, schedule, group, target, mask, weight, logits, grad)
        ctx.implementation = implementation
        ctx.shape, ctx.dtype = logits[0].shape, logits[0].dtype
        link_grad = for_link(link, packed) if link is not None and ctx.needs_input_grad[7] else None
        ctx.save_for_backward(link_grad, factor, *grads)
        ctx.mark_non_differentiable(packed)
        return loss, packed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        link, factor, *grads = ctx.saved_tensors
        if upstream is None:  # nothing depends on the loss
            return (None,) * (8 + len(grads))
        keep = torch.compiler.is_compiling() or _graph_is_kept()
        upstream = upstream.reshape(-1) if upstream.dim() else upstream
        scaled = ctx.implementation.scale(grads, upstream, factor, ctx.dtype, keep)
        return (None,) * 7 + (link, *(_from_rows(g, ctx.shape) for g in scaled))


def for_link(link: Tensor, packed: Tensor) -> Tensor:
    """gains - 1, as often as the link holds the modalities: DataParallel concatenates the links of its replicas."""
    gradient = link_gradient(packed)
    return gradient if link.shape == gradient.shape else gradient.repeat(link.shape[0] // gradient.shape[0])


def refuse_second_derivatives() -> None:
    """In the backward of a loss whose gradients were computed in forward: under create_graph they would pass for constants."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "arl_loss: got a backward with create_graph=True, but its gradients are computed in the forward pass and have no "
            "derivatives of their own; use torch.nn.functional.cross_entropy on the branches where second derivatives are needed"
        )


def refuse_transforms(what: str) -> None:
    """torch.func differentiates and batches functions by rules which the link, an edge between two autograd nodes, is outside of."""
    if _transformed():
        raise RuntimeError(
            f"{what}: called inside a transform of torch.func (grad, vmap, jvp, ...), which cannot carry the link from the loss to the "
            "encoders: use loss.backward() or torch.autograd.grad; for predictions alone, head.branches(features) returns the logits"
        )


def _to_rows(x: Tensor) -> Tensor:
    """[B, C, d1, ...] -> [B d1 ..., C]; a view where the memory allows it (channels-last)."""
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _from_rows(g: Tensor, shape: torch.Size) -> Tensor:
    return g if len(shape) == 2 else g.view(shape[:1] + shape[2:] + shape[1:2]).movedim(-1, 1)


def _mask_rows(mask: Tensor | None, fused: Tensor) -> Tensor | None:
    """[B, M] -> [N, M]: a sample's mask holds at all its positions."""
    if mask is None or fused.dim() == 2:
        return mask
    return mask.repeat_interleave(fused[0, 0].numel(), 0)


def _schedule(gamma: float | Tensor, temperature: float | Tensor, warming: bool | Tensor, like: Tensor) -> rules.Schedule:
    """Numbers stay numbers; as soon as one is a tensor, all three go into one tensor [3] on the logits' device."""
    values = (gamma, temperature, warming)
    if not any(isinstance(value, Tensor) for value in values):
        return float(gamma), float(temperature), bool(warming)
    dtype = compute_dtype(like.dtype)
    return torch.stack([torch.as_tensor(value, dtype=dtype).to(like.device, non_blocking=True) for value in values])


def arl_loss(
    fused: Tensor,
    unimodal: Unimodal,
    target: Tensor,
    link: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    temperature: float | Tensor = 8.0,
    rule: str | Callable[[BranchStats], Tensor] = "share",
    dependence: str = "confidence",
    entropy_floor: float | None = None,
    gain: str = "residual",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    sync_stats: bool | Any = False,
    mask: Tensor | None = None,
    warming: bool | Tensor = False,
    implementation: ModuleType | None = None,
) -> tuple[Tensor, BranchStats]:
    """L = CE(fused, y) + gamma * sum_m CE(unimodal_m, y) (Eq. 22), its statistics, and the gains of the encoders.

    Args:
        fused: [B, C] or [B, C, d1, ...] logits of the whole model, float16 to float64. Read only.
        unimodal: logits of the same shape, dtype and device from the same head, one per modality; dict or sequence.
        target: class indices [B, d1, ...] (int64, int32) or class probabilities of the logits' shape.
        link: the second result of ``modulate``; while gradients are recorded required by every rule but "none".
        gamma: weight of the unimodal losses, a number >= 0 or a 0-d tensor.
        temperature: T of the rule, a number or a 0-d tensor. 0 gives uniform coefficients, below 0 reverses the rule.
        rule: "share", "paper" (two modalities), "constant", "none", or a callable from BranchStats to coefficients [M].
        dependence: "confidence", the mean true-class probability, or "logit_l1", the mean sum of absolute logits.
        entropy_floor: smallest entropy share before the inversion, in [0, 1]; None: 0.6 / number of modalities.
        gain: "residual" 1 + a_m (Eq. 19), "mean_one" M a_m, or "plain" a_m.
        weight, ignore_index, label_smoothing, reduction: as in ``torch.nn.functional.cross_entropy``, for each branch.
        sync_stats: True, or a process group: statistics and mean over all processes (torch.distributed).
        mask: [B, M] bool, False where a modality is absent: those rows leave its loss and its statistics.
        warming: True, or a 0-d bool tensor, while the warm-up runs: gamma = 1 and all gains 1.
        implementation: a module that fulfils docs/architecture.md; None: the one that ``python -m arl_fast`` names.

    Returns:
        loss: 0-d, or [B, d1, ...] for reduction "none"; float32 (float64 for float64 logits).
        stats: BranchStats, detached, on the logits' device; nothing is read back to the host.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range, or a missing link.
        IndexError: a class index out of range, on a CPU. On a GPU, and when compiled, that row's loss is NaN.
    """
    options = make_options(rule, dependence, entropy_floor, gain, ignore_index, label_smoothing, reduction)
    loss, packed = packed_loss(
        fused, unimodal, target, link, mask, weight, gamma, temperature, warming, options, sync_stats, implementation
    )
    return loss, unpack(packed)


def packed_loss(
    fused: Tensor,
    unimodal: Unimodal,
    target: Tensor,
    link: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    gamma: float | Tensor,
    temperature: float | Tensor,
    warming: bool | Tensor,
    options: Options,
    sync_stats: bool | Any = False,
    implementation: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """What arl_loss and ARLLoss share: check, choose the implementation, apply. Returns the loss and the packed stats."""
    if implementation is None and sync_stats is False and (native := dispatch.native_steps()) is not None:
        # None where anything is unusual or wrong
        result = native.fast_loss(options, fused, unimodal, target, link, mask, weight, gamma, temperature, warming)
        if result is not None:
            return result
    refuse_transforms("arl_loss")
    logits = check_logits(fused, unimodal, link)
    weight, schedule, group = prepare(fused, len(logits) - 1, target, mask, weight, gamma, temperature, warming, options, sync_stats)
    require_link(link, logits, options)
    if implementation is None:
        implementation = dispatch.for_loss(fused, options, gamma)
    if recorded((link, *logits)):
        return _ARLLoss.apply(implementation, options, schedule, group, target, mask, weight, link, *logits)
    return _compute(implementation, options, schedule, group, target, mask, weight, logits, False)[:2]


def require_link(link: Tensor | None, logits: Sequence[Tensor], options: Options) -> None:
    """While gradients are recorded a rule that would scale needs a link: silently doing nothing is the classic failure."""
    if link is None and options.scales and torch.is_grad_enabled() and any(x.requires_grad for x in logits):
        raise ValueError(
            f"link: got None, but rule {options.rule!r} scales the encoders' gradients through it: pass the second result of "
            "arl_fast.modulate(features) (the heads of arl_fast do), or rule='none' for the losses alone"
        )


def prepare(
    fused: Tensor,
    modalities: int,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    gamma: float | Tensor,
    temperature: float | Tensor,
    warming: bool | Tensor,
    options: Options,
    sync_stats: bool | Any,
) -> tuple[Tensor | None, rules.Schedule, Any]:
    """Check all that comes with logits like ``fused``: the class weights in the compute dtype, the schedule and the process group."""
    check_target(target, fused)
    check_scalar("gamma", gamma, 0.0)
    check_scalar("temperature", temperature)
    if options.rule == "paper" and modalities != 2:
        raise ValueError(f"rule: 'paper' (Eq. 18) is defined for two modalities, got {modalities}; 'share' takes any number")
    if mask is not None:
        check_mask(mask, fused, modalities)
    if weight is not None:
        check_weight(weight, fused)
        weight = weight.detach().to(compute_dtype(fused.dtype))
    group = None
    if sync_stats is not False:
        from .distributed import resolve_group

        group = resolve_group(sync_stats)
    return weight, _schedule(gamma, temperature, warming, fused), group
