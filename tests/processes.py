"""Tests on several processes of one machine (gloo)."""

from __future__ import annotations

import os
import sys

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)

# Gloo's threads may still hand back a Python object while the interpreter ends, which aborts the process
# (torch 2.13, also without this package). What a process has to say is in its file by then: it ends before
# its interpreter does.
WITHOUT_TEARDOWN = (
    "import os, runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); sys.stdout.flush(); os._exit(0)"
)


def spawn(function, args: tuple, world: int) -> None:
    """``function(rank, *args)`` on ``world`` processes; raises what one of them raises."""
    mp.spawn(_without_teardown, (function, args), nprocs=world)


def _without_teardown(rank: int, function, args: tuple) -> None:
    function(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
