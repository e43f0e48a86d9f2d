"""Every private name of torch that this package uses. tests/test_private_torch.py says which are lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _always_false() -> bool:
    return False


def _always_true() -> bool:
    return True


# Whether a transform of torch.func is running. Without the name nothing is refused.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _always_false)
# Whether the running backward keeps its graph, so that saved gradients must not be handed out. Unknown:
# assume it does.
graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", _always_true
)


def constant_for_compiler(function: Callable) -> Callable:
    """Let torch.compile call the function while it traces and take the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports torch._dynamo with this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling a module runs more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def current_stream(device: int) -> int:
    """The address of the current CUDA stream of a device, without making a torch.cuda.Stream."""
    return torch._C._cuda_getCurrentRawStream(device)


def current_device() -> int:
    """The index of the current CUDA device, without the checks of torch.cuda.current_device."""
    return torch._C._cuda_getDevice()


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over a process group, by its name; works eagerly and compiled."""
    collectives: Any = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """[n] -> [size, n] over a process group of ``size`` processes, by its name."""
    collectives: Any = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), size, group)).view(
        size, -1
    )
