"""The launch plans of the Triton kernels: pure Python, so every class count is checked."""

from __future__ import annotations

import pytest

from arl_fast.implementations.triton import plan as launch_plan

CLASSES = [
    *range(1, 200),
    309,
    511,
    512,
    513,
    1000,
    1023,
    1024,
    1025,
    2048,
    4096,
    8191,
    8192,
    8193,
    32000,
    32001,
    151936,
]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("more_sums", [False, True])
def test_every_plan_is_a_legal_launch(itemsize, more_sums):
    for classes in CLASSES:
        plan = launch_plan.plan(classes, itemsize, more_sums)
        for n in (plan.steps, plan.owners, plan.lanes, plan.threads):
            assert n == launch_plan.power_of_two(n)
        assert 128 <= plan.threads <= 512
        assert plan.registers <= 255
        assert plan.registers * plan.threads <= launch_plan.REGISTER_FILE
        tile = plan.steps * plan.owners * plan.lanes
        assert tile <= 16 * plan.threads
        if plan.online:
            assert plan.owners == plan.threads
            assert plan.rows == 1
        else:
            assert plan.rows == plan.owners
            assert classes <= plan.steps * plan.lanes <= max(1, 2 * (classes - 1))
        if classes * itemsize % 16 == 0:  # the lanes of an owner are whole loads of 16 bytes
            assert plan.lanes * itemsize % 16 == 0


def test_a_long_row_is_streamed_and_a_short_one_is_not():
    assert not launch_plan.plan(8192, 4, False).online
    assert launch_plan.plan(8193, 4, False).online
    assert launch_plan.plan(8192, 8, False).online


def test_programs_cover_the_tiles_and_fit_the_device():
    plan = launch_plan.plan(1000, 4, False)
    assert launch_plan.programs(0, 3, plan, 132) == 1
    assert launch_plan.programs(1, 3, plan, 132) == 1
    assert launch_plan.programs(2 * plan.rows, 3, plan, 132) == 2
    many = launch_plan.programs(10**6, 3, plan, 132)
    assert many == launch_plan.programs(10**8, 3, plan, 132)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("more_sums", [False, True])
@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_all_programs_of_a_large_batch_run_at_once(itemsize, more_sums, multiprocessors):
    """One program more than the device holds would start when the others end, and double the time."""
    for plan in {launch_plan.plan(classes, itemsize, more_sums) for classes in CLASSES}:
        resident = launch_plan.REGISTER_FILE // (plan.registers * plan.threads) * multiprocessors
        for branches in range(2, 18):
            programs = launch_plan.programs(10**8, branches, plan, multiprocessors)
            assert resident - branches < programs * branches <= resident, (plan, branches)


def test_multiplying_programs():
    assert launch_plan.flat_programs(1, 3, 132) == 1
    assert launch_plan.flat_programs(launch_plan.FLAT_BLOCK + 1, 3, 132) == 2
    for tensors in range(1, 18):
        programs = launch_plan.flat_programs(10**9, tensors, 132)
        assert 4 * 132 - tensors < programs * tensors <= 4 * 132
