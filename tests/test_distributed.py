"""Several processes on one machine (gloo): each check of distributed_checks.py runs on every process of its
group.
"""

from __future__ import annotations

import distributed_checks
import pytest
import torch
from processes import needs_gloo, spawn

import arl_fast
from arl_fast.distributed import sharded_arl_loss

pytestmark = needs_gloo

SYNC = [
    "check_ddp_equals_one_process_on_the_joined_batch",
    "check_a_process_without_a_valid_row",
    "check_a_process_without_a_row",
    "check_a_process_whose_rows_weigh_nothing",
    "check_labels_of_all_processes",
    "check_sum_and_none_stay_local",
    "check_sum_with_a_normaliser_is_the_joined_batch",
    "check_local_by_default",
    "check_callable_rule_sees_the_joined_statistics_once",
    "check_linear_loss",
    "check_compiled",
]
PAIR = ["check_compiled_ddp", "check_fsdp2", "check_meshes_and_groups", "check_dtensor_logits_raise"]
SHARDED = [
    "check_sharded_equals_unsharded",
    "check_sharded_extreme_logits",
    "check_sharded_float32_extremes",
    "check_sharded_errors",
    "check_sharded_head_trains_as_the_unsharded",
]
PLAN = {
    2: [*SYNC, *PAIR, *SHARDED, "check_sharded_compiled"],
    3: SYNC[:-1],
    4: [*SHARDED, "check_sharded_classes_and_batch"],
}


@pytest.fixture(scope="module")
def failures(request, tmp_path_factory):
    """Results of a group of processes by its size; every group starts once."""
    done: dict[int, dict[str, list[str]]] = {}

    def of(world: int) -> dict[str, list[str]]:
        if world not in done:
            wanted = {item.callspec.params["name"] for item in request.session.items if _belongs(item, world)}
            out = tmp_path_factory.mktemp(f"processes{world}")
            names = [name for name in PLAN[world] if name in wanted]
            spawn(distributed_checks.run, (world, str(out / "store"), str(out), names), world)
            done[world] = {}
            for rank in range(world):
                for name, text in torch.load(out / f"{rank}.pt").items():
                    done[world].setdefault(name, []).append(f"process {rank}:\n{text}")
        return done[world]

    return of


def _belongs(item: pytest.Item, world: int) -> bool:
    callspec = getattr(item, "callspec", None)
    return (
        item.path.name == "test_distributed.py"
        and callspec is not None
        and callspec.params.get("world") == world
    )


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, names in PLAN.items() for name in names]
)
def test_processes(failures, world, name):
    texts = failures(world).get(name, [])
    assert not texts, "\n".join(texts)


def test_not_initialised_raises():
    x = torch.randn(2, 3)
    target = torch.tensor([0, 1])
    with pytest.raises(
        RuntimeError, match=r"sync_stats: got True, but torch\.distributed is not initialised: start"
    ):
        arl_fast.arl_loss(x, [x, x], target, sync_stats=True)
    with pytest.raises(RuntimeError, match=r"group: got True, but torch\.distributed is not initialised"):
        sharded_arl_loss(x, [x, x], target)
