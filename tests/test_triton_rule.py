"""The launch rule of the Triton kernels: pure Python, so its promises are checked for every class count."""

from __future__ import annotations

import pytest

from arl_fast.implementations.triton import plan as rule

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
@pytest.mark.parametrize("heavy", [False, True])
def test_every_plan_is_a_legal_launch(itemsize, heavy):
    for classes in CLASSES:
        plan = rule.plan(classes, itemsize, heavy)
        for n in (plan.steps, plan.owners, plan.lanes, plan.threads):
            assert n == rule.power_of_two(n)
        assert 128 <= plan.threads <= 512
        assert plan.registers <= 255
        assert plan.registers * plan.threads <= rule.REGISTER_FILE
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
    assert not rule.plan(8192, 4, False).online
    assert rule.plan(8193, 4, False).online
    assert rule.plan(8192, 8, False).online


def test_programs_cover_the_tiles_and_fit_the_device():
    plan = rule.plan(1000, 4, False)
    assert rule.programs(0, 3, plan, 132) == 1
    assert rule.programs(1, 3, plan, 132) == 1
    assert rule.programs(2 * plan.rows, 3, plan, 132) == 2
    many = rule.programs(10**6, 3, plan, 132)
    assert many == rule.programs(10**8, 3, plan, 132)
    resident = rule.REGISTER_FILE // (plan.registers * plan.threads) * 132
    assert resident <= 3 * many < resident + 3


def test_multiplying_programs():
    assert rule.flat_programs(1, 3, 132) == 1
    assert rule.flat_programs(rule.FLAT_BLOCK + 1, 3, 132) == 2
    assert rule.flat_programs(10**9, 3, 132) == 176
