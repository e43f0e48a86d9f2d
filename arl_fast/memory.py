"""The memory that the native kernels keep between steps on a CPU."""

from __future__ import annotations

from .implementations import dispatch


def release_memory() -> int:
    """Give back what is kept for the next large gradients on a CPU. Returns the number of bytes.

    Gradients of 1 MiB and more lie in memory that is kept when they are freed, since new pages cost as much
    as the arithmetic. At most 2 GiB are kept, and in calls of the loss what nobody has used for a minute is
    given back, so this is of use only before something else needs the memory at once.
    """
    native, _ = dispatch.load("native", "cpu")
    return 0 if native is None else native._C.release_memory()
