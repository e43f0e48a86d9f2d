"""What only a GPU can get wrong: launch plans, waiting, graphs, streams, launches, memory, sizes. Skipped
without one.
"""
# ruff: noqa: F811, the fixtures of gpu.py are parameters here

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from gpu import DEVICE, gpu_only, implementation, on_device, plain_device, poisoned  # noqa: F401  first: it skips without a GPU
from test_contract import relative, run

import arl_fast
from arl_fast import ARLLoss, BranchLogits, ConcatHead, arl_loss
from arl_fast.implementations import reference


@pytest.fixture
def kernels(implementation):
    """The implementations that promise few launches and no more memory than the gradients."""
    if implementation == "reference":
        pytest.skip("plain torch promises neither")
    return implementation


def branches(batch, classes, modalities=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(batch, classes, dtype=dtype) * 2 for _ in range(modalities + 1)], torch.randint(
        0, classes, (batch,)
    )


SIZES = [
    (64, 6),
    (64, 309),
    (333, 1001),
    (2048, 1000),
    (129, 32000),
    (8192, 8),
    (5, 128256),
    (300, 9),
    (3, 50257),
]
MANY_ROWS = [(8193, 9), (50_000, 6), (300_000, 19)]  # which no program counts alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "classes"), SIZES + MANY_ROWS)
@pytest.mark.parametrize("modalities", [2, 5])
def test_parity_with_float64(kernels, poisoned, batch, classes, modalities, dtype):
    """Sizes of every launch plan, against the reference in float64."""
    logits, target = branches(batch, classes, modalities, dtype)
    target[::7] = -100
    mask = torch.rand(batch, modalities) > 0.2
    upstream = torch.tensor(1.7)
    options = dict(gamma=1.3, label_smoothing=0.1, mask=mask, weight=torch.rand(classes) + 0.5)
    loss, grads, stats = run(logits, target, upstream=upstream, **options)
    want_loss, want, want_stats = run(
        [x.double() for x in logits], target, upstream=upstream.double(), **options, implementation=reference
    )
    assert relative(loss, want_loss) < 2e-5
    # rounded twice, before and after the upstream gradient
    limit = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert all(relative(g, w) < limit for g, w in zip(grads, want, strict=True))
    for name, got, expected in zip(stats._fields, stats, want_stats, strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 14), (333, 1), (8193, 3), (2048, 309), (300_001, 7)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_next_to_float64(kernels, poisoned, shape, dtype, weighted):
    """Counted by every block, by all together or in a launch before; against the reference in float64."""
    logits, _ = branches(*shape, dtype=dtype)
    target = torch.randint(0, 2, shape).float().masked_fill(torch.rand(shape) < 0.1, torch.nan)
    options = dict(task="multilabel", gamma=1.3)
    if weighted:
        options |= dict(mask=torch.rand(shape[0], 2) > 0.2, pos_weight=torch.rand(shape[1]) + 0.5)
    upstream = torch.tensor(float(target.numel()))  # or the gradients round to nothing in float16
    loss, grads, stats = run(logits, target, upstream=upstream, **options)
    wide = options | ({"pos_weight": options["pos_weight"].double()} if weighted else {})
    want_loss, want, want_stats = run(
        [x.double() for x in logits], target, upstream=upstream.double(), **wide, implementation=reference
    )
    assert relative(loss, want_loss) < 2e-5
    limit = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert all(relative(g, w) < limit for g, w in zip(grads, want, strict=True))
    for got, expected in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)
    for again in range(10):
        for a, b in zip(run(logits, target, upstream=upstream, **options)[1], grads, strict=True):
            assert torch.equal(a, b), again


@gpu_only
@pytest.mark.parametrize("shape", [(64, 14), (4096, 28)])
def test_launches_of_labels(kernels, shape):
    """One forward launch; the native kernels count many pairs in a launch before."""
    from benchmarks.measure import count_launches

    logits, _ = branches(*shape)
    leaves = [x.requires_grad_() for x in logits]
    target, link = torch.randint(0, 2, shape).float(), torch.zeros(2, requires_grad=True)
    criterion = ARLLoss(task="multilabel")
    forward = 2 if kernels == "native" and shape[0] > 64 else 1
    assert count_launches(lambda: criterion(BranchLogits(leaves[0], leaves[1:], link), target)) == forward


def test_int32_targets(implementation):
    logits, target = branches(64, 101)
    for a, b in zip(run(logits, target.int())[1], run(logits, target)[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "classes"), [(64, 6), (700, 309), (64, 32000), (9, 128256), (50_000, 6)])
def test_bitwise_the_same_in_a_hundred_runs(kernels, batch, classes):
    logits, target = branches(batch, classes)
    first = run(logits, target, upstream=torch.tensor(0.3))
    for _ in range(100):
        again = run(logits, target, upstream=torch.tensor(0.3))
        for a, b in zip([first[0], *first[1], *first[2]], [again[0], *again[1], *again[2]], strict=True):
            assert torch.equal(a, b)


def training_step(seed=0, batch=64, classes=101, **options):
    """Encoders, head, loss and a callable that runs forward and backward on static inputs."""
    torch.manual_seed(seed)
    encoders = torch.nn.ModuleList(torch.nn.Linear(32, 48) for _ in range(2))
    head = ConcatHead([48, 48], classes)
    criterion = ARLLoss(**options)
    criterion.to(DEVICE)
    inputs, target = [torch.randn(batch, 32) for _ in range(2)], torch.randint(0, classes, (batch,))
    parameters = [*encoders.parameters(), *head.parameters()]

    def step():
        loss = criterion(head([torch.tanh(e(x)) for e, x in zip(encoders, inputs, strict=True)]), target)
        return [loss, *torch.autograd.grad(loss, parameters)]

    return step, inputs, target, criterion


VARIANTS = {
    "default": {},
    "warm-up": dict(warmup=5),
    "tensors": "tensors",
    "callable rule": dict(rule=lambda stats: torch.softmax(stats.entropy, 0)),
    "weights, smoothing": dict(weight=torch.ones(101), label_smoothing=0.1, ignore_index=3),
    "none": dict(rule="none"),
}


def variant(name):
    chosen = VARIANTS[name]
    return dict(gamma=torch.tensor(2.0), temperature=torch.tensor(3.0)) if chosen == "tensors" else chosen


@gpu_only
@pytest.mark.parametrize("name", VARIANTS)
def test_never_waits_for_the_device(implementation, name):
    step, *_ = training_step(**variant(name))
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize("name", VARIANTS)
def test_captured_in_a_graph_and_replayed(implementation, name):
    """Replays on new inputs equal the eager step on them, bit for bit, again and again."""
    step, inputs, target, criterion = training_step(**variant(name))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(6):  # past the warm-up of the loss as well
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
        stats = criterion.stats
    for seed in range(3):
        torch.manual_seed(100 + seed)
        for x in inputs:
            x.normal_()
        target.random_(0, 101)
        graph.replay()
        graph.replay()
        replayed = [t.clone() for t in [*captured, *stats]]
        eager = step()
        for a, b in zip(replayed, [*eager, *criterion.stats], strict=True):
            assert torch.equal(a, b)


@gpu_only
def test_other_streams(implementation):
    """On a stream of its own, and on two at once without a wait between: no workspace is shared."""
    cases = [branches(512, 309, seed=s) for s in range(2)] + [branches(64, 32000, seed=9)]
    cases += [branches(60_000, 19, seed=s) for s in range(2)]  # whose programs wait for each other
    want = [run(*case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found = []
    for _ in range(20):
        round_ = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                round_.append(run(*case))
        found.append(round_)
    torch.cuda.synchronize()
    for round_ in found:
        for got, expected in zip(round_, want, strict=True):
            for a, b in zip(
                [got[0], *got[1], *got[2]], [expected[0], *expected[1], *expected[2]], strict=True
            ):
                assert torch.equal(a, b)


@gpu_only
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [
        (torch.float32, 26700),
        (torch.float32, 28600),
        (torch.bfloat16, 53300),
        (torch.bfloat16, 57300),
        (torch.float64, 9300),
        (torch.float64, 10200),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_shared_memory_near_48_kilobytes(kernels, dtype, classes, soft):
    """In a process of its own, where no launch before has asked for more. Windows of C that once failed."""
    program = f"""
import torch, arl_fast
x = [torch.randn(2, {classes}, device="cuda", dtype={dtype}) for _ in range(2)]
y = torch.randint(0, {classes}, (2,), device="cuda")
if {soft}:
    kind = torch.{"float64" if dtype == torch.float64 else "float32"}
    y = torch.nn.functional.one_hot(y, {classes}).to(kind)
loss, _ = arl_fast.arl_loss(x[0], x[1:], y, rule="none")
assert torch.isfinite(loss)
"""
    environment = os.environ | {"ARL_FAST_IMPL": kernels}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@gpu_only
def test_compiled_with_reduce_overhead(kernels):
    """Graphs that the compiler captures, and replays after a capture of another step between."""
    torch.compiler.reset()
    compiled = torch.compile(ARLLoss(warmup=2), fullgraph=True, mode="reduce-overhead")
    eager = ARLLoss(warmup=2)
    for i in range(6):
        logits, target = branches(64 if i % 2 else 32, 101, seed=i)
        leaves = [x.requires_grad_() for x in logits]
        link = torch.zeros(2, requires_grad=True)
        results = []
        for criterion in (compiled, eager):
            torch.compiler.cudagraph_mark_step_begin()
            loss = criterion(BranchLogits(leaves[0], leaves[1:], link), target)
            grads = torch.autograd.grad(loss, [*leaves, link])
            results.append([loss.detach().clone(), *(g.clone() for g in grads)])
        torch.testing.assert_close(*results)


@gpu_only
def test_a_failed_launch_leaves_no_error_behind(plain_device):
    """CUDA would blame it on whatever torch calls next."""
    from arl_fast.implementations import native

    if native.unavailable("cuda"):
        pytest.skip("no native kernels")
    logits = [torch.randn(2, 3, device="cuda") for _ in range(20)]  # more branches than a launch takes
    target = native.Targets(torch.zeros(2, dtype=torch.long, device="cuda"))
    with pytest.raises(RuntimeError, match="got 20 branches"):
        native._C.cuda_forward(logits, target, native.Schedule(1.0, 8.0), native.Options(), False)
    assert float(torch.ones(2, device="cuda").sum()) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(implementation, dynamic):
    step, inputs, target, criterion = training_step()
    want = [t.clone() for t in step()]
    gains = criterion.stats.gains.clone()
    torch.manual_seed(0)
    encoders = torch.nn.ModuleList(torch.nn.Linear(32, 48) for _ in range(2))
    head = ConcatHead([48, 48], 101)
    criterion = ARLLoss()

    def forward(inputs, target):
        return criterion(head([torch.tanh(e(x)) for e, x in zip(encoders, inputs, strict=True)]), target)

    torch.compiler.reset()
    loss = torch.compile(forward, fullgraph=True, dynamic=dynamic)(inputs, target)
    got = [loss, *torch.autograd.grad(loss, [*encoders.parameters(), *head.parameters()])]
    torch.testing.assert_close(criterion.stats.gains, gains)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@gpu_only
@pytest.mark.parametrize("warmup", [0, 3])
def test_compiled_with_cuda_graphs(implementation, warmup):
    """mode="reduce-overhead" warms up, captures and replays; it skips ops that keep memory of its graphs."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    head = ConcatHead([48, 48], 101)
    criteria = [ARLLoss(warmup=warmup, gamma=(0.5, 2.0)) for _ in range(2)]
    target = torch.randint(0, 101, (64,))

    def forward(criterion, z):
        return criterion(head(z), target)

    compiled = torch.compile(forward, fullgraph=True, mode="reduce-overhead")
    for _ in range(6):
        z = [torch.randn(64, 48, requires_grad=True) for _ in range(2)]
        found = []
        for function, criterion in zip((forward, compiled), criteria, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            loss = function(criterion, z)
            grads = torch.autograd.grad(loss, [*z, *head.parameters()])
            found.append([t.detach().clone() for t in (loss, *grads, *criterion.stats)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert not counters["inductor"]["cudagraph_skips"]


@gpu_only
@pytest.mark.parametrize(("batch", "classes"), [(64, 6), (64, 309), (2048, 1000), (20_000, 6)])
def test_launches(kernels, batch, classes):
    """Forward is one launch, backward for an upstream gradient of 1 at most two, torch's own fill included.

    The native kernels count more than 8192 rows in a launch before.
    """
    from benchmarks.measure import count_launches

    logits, target = branches(batch, classes)
    leaves = [x.requires_grad_() for x in logits]
    link = torch.zeros(2, requires_grad=True)
    criterion = ARLLoss()

    def record():
        return criterion(BranchLogits(leaves[0], leaves[1:], link), target)

    forward = 2 if kernels == "native" and batch > 8192 else 1
    assert count_launches(record) == forward
    assert count_launches(lambda: torch.autograd.grad(record(), [*leaves, link])) <= forward + 2


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradients_and_none_in_evaluation(kernels, dtype):
    from benchmarks.measure import peak_bytes

    logits, target = branches(512, 4000, dtype=dtype)
    size = sum(x.numel() * x.element_size() for x in logits)
    leaves = [x.requires_grad_() for x in logits]

    def step():
        return torch.autograd.grad(arl_loss(leaves[0], leaves[1:], target, rule="none")[0], leaves)

    def evaluation():
        with torch.no_grad():
            return arl_loss(logits[0], logits[1:], target)

    slack = 1 << 20  # workspaces, the allocator's rounding
    assert peak_bytes(step) <= size + slack
    assert peak_bytes(evaluation) <= slack


@gpu_only
def test_what_comes_from_the_cpu(implementation, plain_device):
    """Numbers and 0-d tensors of the CPU are taken; tensors on another device than the logits are named."""
    logits = [torch.randn(8, 5, device="cuda") for _ in range(3)]
    target = torch.randint(0, 5, (8,), device="cuda")
    want = arl_loss(logits[0], logits[1:], target, gamma=2.0, temperature=3.0)
    got = arl_loss(
        logits[0],
        logits[1:],
        target,
        gamma=torch.tensor(2.0),
        temperature=torch.tensor(3.0),
        warming=torch.tensor(False),
    )
    torch.testing.assert_close(got[0], want[0])
    with pytest.raises(ValueError, match="target: got device cpu"):
        arl_loss(logits[0], logits[1:], target.cpu())


@gpu_only
def test_autocast_and_loss_scale(implementation):
    """float16 logits and a loss scale: gradients that would round to zero survive it."""
    logits, target = branches(4096, 1000, dtype=torch.float16)
    leaves = [x.requires_grad_() for x in logits]
    scale = torch.tensor(65536.0)
    loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
    grads = torch.autograd.grad(loss * scale, leaves)
    doubles = [x.detach().double().requires_grad_() for x in logits]
    loss, _ = arl_loss(doubles[0], doubles[1:], target, rule="none", implementation=reference)
    for g, w in zip(grads, torch.autograd.grad(loss * scale, doubles), strict=True):
        assert relative(g, w) < 1e-3


@gpu_only
def test_more_than_two_to_the_31_elements(kernels):
    rows, classes = 70_000, 32_000
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB")
    logits = [torch.empty(rows, classes, dtype=torch.bfloat16).normal_() for _ in range(2)]
    target = torch.randint(0, classes, (rows,))
    loss, grads, _ = run(logits, target, gamma=0.5)
    assert torch.isfinite(loss)
    for x, g, weight in zip(logits, grads, (1.0, 0.5), strict=True):
        for part in (slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(rows - 3, rows)):
            p = torch.softmax(x[part].double(), 1)
            p[torch.arange(3), target[part]] -= 1
            assert relative(g[part], p * weight / rows) < 4e-3


@pytest.mark.skipif(DEVICE != "cuda" or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_device_while_the_first_is_current(implementation, plain_device):
    logits = [torch.randn(64, 101, device="cuda:1") for _ in range(3)]
    target = torch.randint(0, 101, (64,), device="cuda:1")
    loss, stats = arl_loss(logits[0], logits[1:], target)
    want, _ = arl_loss(
        *([logits[0].cpu(), [x.cpu() for x in logits[1:]], target.cpu()]), implementation=reference
    )
    torch.testing.assert_close(loss.cpu(), want)
    assert stats.gains.device.index == 1


@pytest.mark.parametrize(
    ("batch", "classes", "dtype"),
    [(5, 3, torch.float32), (33, 129, torch.bfloat16), (3, 5000, torch.float16)],
)
def test_small_steps(implementation, batch, classes, dtype):
    """Few, small and of every kind: what compute-sanitizer is run on."""
    logits, target = branches(batch, classes, 3, dtype)
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[0, 1] = False
    run(logits, target, mask=mask, upstream=torch.tensor(2.0))
    run(
        logits,
        torch.softmax(torch.randn(batch, classes), 1),
        reduction="none",
        weight=torch.ones(classes),
        upstream=torch.ones(batch),
    )
    wide = [torch.cat([x[:, :1], x], 1)[:, 1:] for x in logits]
    run(wide, target, label_smoothing=0.1)
    with torch.no_grad():
        arl_loss(logits[0], logits[1:], target)
    z = [torch.randn(batch, 7, requires_grad=True) for _ in range(3)]
    head = arl_fast.SharedHead([7, 7, 7], classes)
    ARLLoss()(head(z), target).backward()
