"""Where Triton's interpreter does not do what its compiler does."""

from __future__ import annotations

import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    round_bfloat16()
    index_scalars()


def round_bfloat16() -> None:
    """It cuts bfloat16 results short where the hardware rounds to nearest; with this it rounds as well."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.cast_impl

    def cast(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar not in (tl.float32, tl.float64):
            return original(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16)
        return handle(rounded.numpy().reshape(src.data.shape), dst_type.scalar)

    builder.cast_impl = cast


def index_scalars() -> None:
    """Triton 3.6 makes a number of an array of one element by int(), which NumPy 2.4 and newer refuse."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
