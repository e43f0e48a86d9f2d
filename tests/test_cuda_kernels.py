"""The CUDA kernels beyond the contract: every path of the launch rule, addresses, order of blocks, tickets.
Emulated.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from emulation import build

if build.unavailable():
    pytest.skip(build.unavailable(), allow_module_level=True)

from emulation import guarded, module

from arl_fast._core import dtypes
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule
from arl_fast._core.stats import unpack
from arl_fast.implementations import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 3e-6}
SMALL, WARP, BLOCK = range(3)
SHARED = 232448  # what sm_90 and sm_100 allow a block
SCHEDULE = Schedule(1.5, 4.0)
DEVICES = {"sm_90": (132, 232448), "sm_80": (108, 166912), "sm_100": (148, 232448), "sm_89": (24, 101376)}


@pytest.fixture(autouse=True)
def device():
    """Few multiprocessors, so that persistent blocks loop over rows."""
    module.library().set_device(2, SHARED)
    module.library().set_seed(1)
    yield
    module.library().set_device(3, SHARED)


def options(**given):
    defaults = dict(
        rule="share",
        dependence="confidence",
        entropy_floor=None,
        gain="residual",
        ignore_index=-100,
        label_smoothing=0.0,
        reduction="mean",
    )
    return Options(**{**defaults, **given})


def make(rows, classes, dtype=torch.float32, branches=3, kind="hard"):
    logits = [(2 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype) for _ in range(branches)]
    if kind == "soft":
        return logits, torch.softmax(torch.randn(rows, classes), 1).to(dtypes.compute_dtype(dtype))
    target = torch.randint(0, classes, (rows,))
    target[4::5] = -100
    return logits, target


def relative(got, want):
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compare(logits, target, chosen=None, mask=None, weight=None, divisor=None, schedule=SCHEDULE, **more):
    """The emulated kernels against the reference in float64, on the same rounded logits."""
    chosen = chosen or options()
    dtype = logits[0].dtype
    targets = Targets(target, mask, weight, divisor)
    loss, packed, grads = module.forward(logits, targets, schedule, chosen, True, **more)
    want_loss, want_packed, want_grads = reference.forward(
        [x.double() for x in logits],
        Targets(*map(double, targets)),
        Schedule(*map(double, schedule)),
        chosen,
        True,
    )
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), want_loss, rtol=exact, atol=exact)
    torch.testing.assert_close(packed.double(), want_packed, rtol=exact, atol=exact)
    for got, want in zip(grads, want_grads, strict=True):
        assert got.dtype == dtypes.grad_dtype(dtype)
        assert relative(got, want) < TOLERANCE[dtype]
    return loss, packed, grads


def plan(dtype, rows, classes, branches=3, dense=False, per_row_loss=False, counts=True, device=(2, SHARED)):
    shape = module.Shape(module.DTYPES[dtype], branches, rows, classes, dense, per_row_loss, counts)
    return module.plan(shape, module.Device(*device))


# Rows and classes for each place where the rule turns, with what it must choose: family, threads per row.
PLACES = [
    (torch.float32, 300, 6, SMALL, 1),
    (torch.float32, 5, 8, SMALL, 1),
    (torch.float32, 70, 9, SMALL, 2),
    (torch.bfloat16, 40, 34, SMALL, 8),
    (torch.float64, 9, 101, SMALL, 16),
    (torch.float16, 20, 256, SMALL, 32),
    (torch.float32, 20, 257, WARP, 32),
    (torch.float64, 5, 515, BLOCK, 64),
    (torch.bfloat16, 9, 1031, WARP, 32),
    (torch.float16, 30, 1000, WARP, 32),
    (torch.float32, 33, 1027, WARP, 32),
    (torch.float32, 17, 1030, BLOCK, 64),
    (torch.bfloat16, 17, 2047, BLOCK, 64),
    (torch.float64, 5, 2049, BLOCK, 128),
    (torch.float16, 5, 8195, BLOCK, 128),
    (torch.bfloat16, 1, 5003, BLOCK, 256),
    (torch.float32, 1, 8193, BLOCK, 256),
    (torch.float64, 2, 5001, BLOCK, 256),
]


@pytest.mark.parametrize(("dtype", "rows", "classes", "family", "threads"), PLACES)
def test_every_family(dtype, rows, classes, family, threads):
    chosen = plan(dtype, rows, classes)
    assert (chosen.family, chosen.threads_per_row) == (family, threads)
    logits, target = make(rows, classes, dtype)
    before = module.library().launches()
    compare(logits, target)
    assert module.library().launches() == before + 1
    compare(logits, target.int(), options(label_smoothing=0.1, dependence="logit_l1", reduction="sum"))


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, 6), (torch.bfloat16, 300), (torch.float64, 700), (torch.float16, 5000)],
)
@pytest.mark.parametrize("kind", ["soft", "weighted", "soft weighted"])
def test_dense_targets(dtype, classes, kind):
    """Class probabilities, and class weights under label smoothing, in every family."""
    logits, target = make(11, classes, dtype, kind=kind.split()[0])
    weight = torch.rand(classes, dtype=dtypes.compute_dtype(dtype)) + 0.1 if "weighted" in kind else None
    mask = torch.rand(11, 2) > 0.3
    for reduction in ("mean", "none"):
        compare(logits, target, options(label_smoothing=0.1, reduction=reduction), mask=mask, weight=weight)


@pytest.mark.parametrize(
    ("dtype", "classes", "shared", "vectors"),
    [
        (torch.float32, 16403, SHARED, 1),
        (torch.bfloat16, 60001, 44000, 4),
        (torch.float64, 9001, 33000, 6),
        (torch.float16, 40001, SHARED, 2),
    ],
)
def test_rows_beyond_the_registers(dtype, classes, shared, vectors):
    """Registers and shared memory; then also what is read again because neither can hold it."""
    module.library().set_device(2, shared)
    chosen = plan(dtype, 2, classes, branches=2, device=(2, shared))
    assert (chosen.threads, chosen.shared_vectors) == (256 if dtype == torch.float64 else 512, vectors)
    logits, target = make(2, classes, dtype, branches=2)
    target[1] = classes - 1
    compare(logits, target)
    compare(logits, target, options(dependence="logit_l1", label_smoothing=0.05))
    compare(*make(1, classes, dtype, branches=2, kind="soft"))


@pytest.mark.parametrize(
    ("dtype", "classes", "blocks"),
    [
        (torch.float32, 72003, 2),
        (torch.bfloat16, 150001, 2),
        (torch.float64, 80001, 4),
        (torch.float16, 300005, 4),
    ],
)
def test_a_cluster_holds_what_no_block_can(dtype, classes, blocks):
    """Rows too long for one multiprocessor lie in the shared memory of several, and are read once."""
    chosen = plan(dtype, 3, classes, branches=2, device=(6, SHARED, True))
    assert chosen.cluster == blocks
    vectors = classes // (16 // dtype.itemsize)
    assert vectors <= chosen.cluster * chosen.threads * (8 + chosen.shared_vectors)
    assert plan(dtype, 3, classes, branches=2, device=(6, SHARED, False)).cluster == 1
    module.library().set_device_with_clusters(6, SHARED)
    logits, target = make(3, classes, dtype, branches=2)
    target[0], target[2] = classes - 1, 0
    compare(logits, target)
    compare(logits, target, options(dependence="logit_l1", label_smoothing=0.05, reduction="none"))
    if dtype == torch.float32:
        compare(*make(1, classes, dtype, branches=2, kind="soft"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [5, 261, 1100, 2100])
def test_no_access_out_of_range(dtype, classes, monkeypatch):
    """Every buffer ends at a forbidden page, then starts after one; rows that are misaligned in every way."""
    logits, target = make(7, classes, dtype)
    weight = torch.rand(classes, dtype=dtypes.compute_dtype(dtype))
    mask = torch.rand(7, 2) > 0.3
    for at_start in (False, True):
        monkeypatch.setattr(
            module,
            "allocate",
            lambda shape, dtype, a=at_start: guarded.empty(shape, dtype, a or dtype == torch.uint8),
        )
        inputs = [guarded.copy(x, at_start) for x in logits]
        given = [guarded.copy(x, at_start) for x in (target, mask, weight)]
        _, _, grads = compare(inputs, given[0], mask=given[1], weight=given[2])
        upstream = guarded.copy(torch.rand(7, dtype=weight.dtype), at_start)
        scaled = module.scale(grads, upstream, guarded.copy(weight[:3], at_start), dtype, True)
        for m, (g, s) in enumerate(zip(grads, scaled, strict=True)):
            torch.testing.assert_close(
                s, (g.to(weight.dtype) * (upstream * weight[m])[:, None]).to(dtype), rtol=0, atol=0
            )
        for g, s in zip(grads, module.modulate_backward(grads, given[2][:3]), strict=True):
            assert g.shape == s.shape


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, 7), (torch.float32, 600), (torch.bfloat16, 2500), (torch.float16, 2500)],
)
@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("offset", [0, 1])
def test_strides(dtype, classes, gap, offset):
    """Rows with a gap of NaN, at any alignment relative to their gradients; strided targets and masks;
    expanded rows.
    """
    logits, target = make(6, classes, dtype)
    wide = [torch.full((6, classes + gap + offset), torch.nan, dtype=dtype) for _ in logits]
    for w, x in zip(wide, logits, strict=True):
        w[:, offset : offset + classes] = x
    views = [w[:, offset : offset + classes] for w in wide]
    views[1] = views[1][:1].expand(6, classes)
    mask = torch.rand(2, 12) > 0.3
    compare(views, torch.stack([target, target], 1)[:, 0], mask=mask[:, ::2].t())


def test_rows_far_apart():
    """Offsets beyond 2^31 elements."""
    logits, target = make(3, 300, branches=2)
    target[:] = torch.tensor([3, 1, 299])
    far = [guarded.far_apart(x, 2**31 + 4) for x in logits]
    near = compare(logits, target)
    got = compare(far, target)
    for a, b in zip([*got[:2], *got[2]], [*near[:2], *near[2]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [3, 300, 1500])
def test_same_bits_whatever_the_order_of_the_blocks(reduction, classes):
    module.library().set_device(4, SHARED)
    logits, target = make(700 if classes == 3 else 40, classes)
    chosen = options(reduction=reduction)
    results = []
    for seed in range(4):
        module.library().set_seed(seed)
        loss, packed, grads = module.forward(logits, Targets(target), SCHEDULE, chosen, True)
        results.append([loss, packed, *grads])
    assert plan(torch.float32, len(target), classes, device=(4, SHARED)).grid_x >= 2
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def capturing():
    """Turns the capture of a graph on and off."""
    yield module.library().set_capturing
    module.library().set_capturing(False)


def test_tickets(capturing):
    """A counter for each stream, one for each captured launch; no launch and no memset for any of them."""
    logits, target = make(20, 6)
    lib = module.library()
    launches, memsets = lib.launches(), lib.memsets()
    first = compare(logits, target)
    capturing(True)
    captured = compare(logits, target)
    assert (lib.launches(), lib.memsets()) == (launches + 2, memsets)
    assert torch.equal(first[1], captured[1])
    of_graphs = [lib.ticket_of(7) for _ in range(3)]
    capturing(False)
    of_streams = [lib.ticket_of(stream) for stream in (7, 8, 7)]
    assert of_streams[0] == of_streams[2]
    assert len({*of_graphs, *of_streams}) == 5
    assert -1 not in of_graphs + of_streams
    assert -2 not in of_graphs + of_streams


def test_memset_where_no_ticket_is_left(capturing):
    lib = module.library()
    capturing(True)
    while lib.ticket_of(7) != -1:
        pass
    memsets = lib.memsets()
    compare(*make(20, 6))
    assert lib.memsets() == memsets + 1
    capturing(False)
    compare(*make(20, 6))
    assert lib.memsets() == memsets + 1


# Their dynamic shared memory lies between what no kernel has to ask for and 48 KB.
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, 26628), (torch.float32, 28675), (torch.bfloat16, 53256), (torch.float64, 9218)],
)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_little_dynamic_shared_memory(dtype, classes, kind):
    """A kernel's static shared memory counts against the 48 KB, too, that it may have without asking."""
    module.library().forget_opt_ins()
    compare(*make(1, classes, dtype, branches=2, kind=kind))


def test_every_plan_asks_for_its_shared_memory():
    """Whatever C is: what is not asked for fits into 48 KB beside the static shared memory of a kernel."""
    lib, windows = module.library(), 0
    for dtype, dense in itertools.product(DTYPES, [False, True]):
        for classes in range(256, 70000, 61):
            p = plan(dtype, 64, classes, dense=dense, device=DEVICES["sm_90"])
            dynamic = 16 * p.threads * p.shared_vectors
            assert lib.needs_opt_in_of(dynamic) or dynamic + 8192 <= 48 * 1024
            windows += 48 * 1024 - 8192 < dynamic <= 48 * 1024
    assert windows > 0


def test_failures_leave_no_trace():
    """A failed query of the device is asked again, and no error stays for the next call of anybody."""
    lib = module.library()
    lib.set_device(5, SHARED - 4096)
    lib.fail_queries(1)
    logits, target = make(4, 6)
    with pytest.raises(AssertionError):
        module.forward(logits, Targets(target), SCHEDULE, options(), True)
    assert lib.last_error() == 0
    compare(logits, target)
    lib.fail_launches(2)
    with pytest.raises(AssertionError):
        module.forward(logits, Targets(target), SCHEDULE, options(), True)
    with pytest.raises(AssertionError):
        module.scale(logits, torch.tensor(2.0), None, torch.float32, True)
    assert lib.last_error() == 0
    compare(logits, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address(dtype):
    """Rows that are not aligned, below and above an address whose 31st bit, in elements, is set."""
    logits, target = make(3, 1301, dtype, branches=2)
    low, high = (compare([guarded.at_bit(x, 31, bit) for x in logits], target)[2] for bit in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_counting_launch(weighted):
    """Many rows: a separate launch counts the divisors. Nothing to count: none."""
    rows = 8193
    logits, target = make(rows, 2, branches=2)
    weight = torch.tensor([0.5, 2.0]) if weighted else None
    mask = torch.rand(rows, 1) > 0.5
    before = module.library().launches()
    compare(logits, target, mask=mask, weight=weight)
    assert module.library().launches() == before + 2
    compare(logits, target, mask=mask, weight=weight, divisor=torch.tensor([11.0, 7.0]))
    compare(*make(rows, 2, branches=2, kind="soft"))
    compare(logits, target, options(reduction="sum"), mask=mask)
    module.forward(logits, Targets(target, mask, weight), SCHEDULE, options(), False)
    assert module.library().launches() == before + 6


@pytest.mark.parametrize("classes", [5, 300, 1500])
def test_target_out_of_range_is_nan(classes):
    """No check can stall a GPU: the row's loss, statistics and gradient are NaN, and only the row's."""
    logits, target = make(8, classes)
    target[:] = 1
    for bad, kind in itertools.product([-1, classes, 2**31 - 1], [torch.int64, torch.int32]):
        target[3] = bad
        loss, packed, grads = module.forward(
            logits, Targets(target.to(kind)), SCHEDULE, options(reduction="none"), True, check=False
        )
        stats = unpack(packed)
        assert loss.isnan().tolist() == [n == 3 for n in range(8)]
        for g in grads:
            assert g.isnan().all(1).tolist() == [n == 3 for n in range(8)]
            assert g.isnan().any(1).tolist() == [n == 3 for n in range(8)]
        for value in (stats.loss, stats.accuracy, stats.entropy, stats.dependence):
            assert value.isnan().all()
        assert stats.count.tolist() == [8, 8, 8]


def test_row_of_nan_shows():
    logits, target = make(6, 40)
    target[:] = 2
    logits[1][4, 7] = torch.nan
    loss, packed, grads = module.forward(logits, Targets(target), SCHEDULE, options(), True)
    assert loss.isnan()
    assert unpack(packed).entropy.isnan().tolist() == [True, False]
    assert grads[1].isnan().all(1).tolist() == [False] * 4 + [True, False]
    assert not grads[0].isnan().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_schedule_on_the_device(reduction):
    """Each number by itself as a tensor, one gamma or one per modality; the counter before, at and after its
    limit.
    """
    logits, target = make(9, 12)
    three = torch.tensor(3.0)
    for gamma in (2.5, (0.5, 2.0), torch.tensor(2.5), torch.tensor([[0.5, 7.0], [2.0, 7.0]])[:, 0]):
        for temperature in (3.0, three):
            compare(logits, target, options(reduction=reduction), schedule=Schedule(gamma, temperature))
        for step in (None, *map(torch.tensor, (0, 4, 5, 2**40))):
            chosen = options(reduction=reduction, gain="mean_one")
            compare(logits, target, chosen, schedule=Schedule(gamma, three, 5, step))


@pytest.mark.parametrize("branches", [2, 9, 16])
def test_many_branches(branches):
    compare(*make(5, 6, branches=branches))
    compare(*make(5, 6, branches=branches), options(reduction="none"))


def test_too_many_branches_are_refused():
    args = module.ForwardArgs(dtype=1, branches=17, rows=1, classes=1)
    assert module.library().emulated_forward(ctypes.byref(args)) != 0


def test_no_rows():
    logits, target = make(0, 6)
    loss, packed, grads = module.forward(logits, Targets(target), SCHEDULE, options(), True)
    assert loss.isnan()
    assert unpack(packed).count.tolist() == [0, 0, 0]
    loss, _, _ = module.forward(logits, Targets(target), SCHEDULE, options(reduction="none"), True)
    assert loss.shape == (0,)
    assert module.scale(grads, torch.ones(()), None, torch.float32, True)[0].shape == (0, 6)


def test_scale_leaves_early():
    """In place with a factor of exactly 1 nothing is written: the memory may be read-only."""
    grads = [guarded.read_only(torch.randn(5, 7)) for _ in range(3)]
    assert module.scale(grads, torch.tensor(1.0), None, torch.float32, False) == grads
    assert module.scale(grads, torch.tensor(2.0), torch.full((3,), 0.5), torch.float32, False) == grads
    kept = module.scale(grads, torch.tensor(1.0), None, torch.float32, True)
    assert all(torch.equal(k, g) and k.data_ptr() != g.data_ptr() for k, g in zip(kept, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (5, 3), (3, 700), (1, 12000)])
@pytest.mark.parametrize("upstream", ["scalar", "row", "strided", "expanded"])
def test_scale(dtype, shape, upstream):
    compute = dtypes.compute_dtype(dtype)
    grads = [torch.randn(shape, dtype=torch.float64).to(dtypes.grad_dtype(dtype)) for _ in range(3)]
    factor = torch.rand(3, dtype=compute)
    up = torch.randn(shape[0], 2, dtype=compute)
    up = {
        "scalar": up[0, 0],
        "row": up[:, 0].clone(),
        "strided": up[:, 1],
        "expanded": up[:1, 0].expand(shape[0]),
    }[upstream]
    want = reference.scale(grads, up, factor, dtype, True)
    for keep in (True, False):
        copies = [g.clone() for g in grads]
        got = module.scale(copies, up, factor, dtype, keep)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


def test_modulate_backward():
    """Any mix of dtypes, sizes (0 too), alignments and missing gradients."""
    for link_dtype in (torch.float32, torch.float64):
        grads = [
            torch.randn(n, dtype=torch.float64).to(d)
            for n, d in zip([3000, 1, 0, 17, 260, 33], DTYPES[-3:] * 2, strict=True)
        ]
        grads[4] = grads[4][1:]
        if link_dtype == torch.float64:
            grads.append(torch.randn(5000, dtype=torch.float64))
        grads.insert(2, None)
        link = torch.randn(len(grads), dtype=link_dtype)
        for got, want in zip(
            module.modulate_backward(grads, link), reference.modulate_backward(grads, link), strict=True
        ):
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got, want)


@pytest.mark.parametrize(
    ("rule", "gain"),
    [
        *itertools.product(["share", "paper", "constant", "none"], ["residual", "mean_one", "plain"]),
        ("ogm", "plain"),
    ],
)
@pytest.mark.parametrize("floor", [None, 0.0, 0.4])
def test_finish(rule, gain, floor):
    """Every rule, gain and floor, beside a modality that is absent."""
    logits, target = make(9, 5, torch.float64)
    for mask in (None, torch.tensor([[True, False]]).expand(9, 2)):
        compare(logits, target, options(rule=rule, gain=gain, entropy_floor=floor), mask=mask)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_rule(device):
    """What every plan must keep to, on a grid of shapes."""
    multiprocessors, shared = device
    for dtype, rows, classes, branches, dense, none in itertools.product(
        DTYPES,
        [0, 1, 64, 8192, 8193, 2**33],
        [1, 2, 6, 309, 1000, 4096, 32000, 128256, 262144, 10**6],
        [2, 3, 16],
        [False, True],
        [False, True],
    ):
        p = plan(dtype, rows, classes, branches, dense, none, device=device)
        per_vector = 16 // dtype.itemsize
        heavy = dense or dtype == torch.float64
        resident = (512 if heavy else 768) if p.family == SMALL else (256 if heavy else 512)
        assert p.threads % 32 == 0
        assert p.threads <= resident
        assert p.rows_per_block * p.threads_per_row == p.threads
        assert p.grid_y == (1 if none else branches)
        assert 1 <= p.grid_x <= max(1, rows)
        # all blocks resident at once, unless there are more branches than places
        assert p.grid_x == 1 or p.grid_x * p.grid_y <= multiprocessors * (resident // p.threads)
        assert p.shared_vectors * p.threads * 16 + 8192 <= shared
        if p.family == SMALL:
            assert classes <= 8 * p.threads_per_row
        elif p.family == WARP:
            assert not heavy
            assert classes // per_vector <= 32 * (4 if dtype.itemsize == 2 else 8)
        else:
            on_chip = p.threads * (8 + p.shared_vectors)
            assert on_chip >= classes // per_vector or p.shared_vectors == (shared - 8192) // (16 * p.threads)
        assert (p.count_blocks > 0) == (rows > 8192)
        assert p.workspace_bytes == 16 + branches * max(4, dtype.itemsize) * (6 * p.grid_x + p.count_blocks)
    assert plan(torch.float32, 2**33, 6, counts=False).count_blocks == 0
