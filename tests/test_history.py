"""History: what it keeps, what it averages, that it waits for nothing and goes on after a restart."""

from __future__ import annotations

import copy
import io
import pickle
from collections import deque

import pytest
import torch

import arl_fast
from arl_fast import ARLLoss, BranchStats, ConcatHead, History, plots

NAMES = ["audio", "visual"]


def random_stats(modalities: int = 2, dtype=torch.float64) -> BranchStats:
    sizes = [modalities + 1] * 2 + [modalities] * 6 + [modalities + 1]
    stats = BranchStats(*(torch.rand(n, dtype=dtype) for n in sizes))
    return stats._replace(count=torch.randint(1, 9, (modalities + 1,)).to(dtype))


def training(history: History | None = None, epochs: int = 2, dtype=torch.float32, **options):
    """A criterion that is tracked over a few steps and uneven evaluation batches; what criterion.stats said
    each time.
    """
    head = ConcatHead(dict.fromkeys(NAMES, 4), 3).to(dtype)
    criterion = ARLLoss(**options)
    history = criterion.track(history)
    steps, evaluations = [], []
    for _ in range(epochs):
        criterion.train()
        for _ in range(5):
            criterion(
                head({m: torch.randn(6, 4, dtype=dtype, requires_grad=True) for m in NAMES}),
                torch.randint(3, (6,)),
            ).backward()
            steps.append(criterion.stats)
        criterion.eval()
        with torch.no_grad():
            for rows in (7, 2):
                z, y = {m: torch.randn(rows, 4, dtype=dtype) for m in NAMES}, torch.randint(3, (rows,))
                criterion(head(z), y)
                evaluations.append((z, y))
        history.end_epoch()
    return history, steps, evaluations, head


@pytest.mark.parametrize("every", [1, 3, 5, 256])
def test_keeps_every_step_and_the_means_of_epochs(every):
    history, steps, _, _ = training(History(every=every))
    assert (history.step, history.epoch, history.modalities) == (10, 2, NAMES)
    rows = history.rows()
    assert rows["step"].tolist() == list(range(10))
    assert rows["epoch"].tolist() == [0] * 5 + [1] * 5
    for i, stats in enumerate(steps):
        for field, value in stats._asdict().items():
            assert torch.equal(history.series(field)[i], value.double()), field
    assert float(rows["gain/visual"][3]) == float(steps[3].gains[1])
    epochs = history.rows("epochs")
    assert epochs["step"].tolist() == [5, 10]
    for e in range(2):
        mean = torch.stack([s.loss for s in steps[5 * e : 5 * e + 5]]).double().mean(0)
        torch.testing.assert_close(history.series("loss", "epochs")[e], mean, rtol=1e-12, atol=0)


def test_held_out_batches_weigh_as_much_as_they_have_rows():
    """The mean over batches of 7 and 2 is what one call on all 9 rows gives."""
    history, _, evaluations, head = training(dtype=torch.float64)
    for e in range(2):
        (za, ya), (zb, yb) = evaluations[2 * e : 2 * e + 2]
        whole = ARLLoss()
        with torch.no_grad():
            whole(head({m: torch.cat([za[m], zb[m]]) for m in NAMES}), torch.cat([ya, yb]))
        for field in ("loss", "accuracy", "entropy", "dependence", "count"):
            torch.testing.assert_close(history.series(field, "held_out")[e], getattr(whole.stats, field))


def test_an_absent_modality_does_not_enter_the_held_out_mean():
    history, head, criterion = History(), ConcatHead(dict.fromkeys(NAMES, 4), 3), ARLLoss().eval()
    criterion.track(history)
    with torch.no_grad():
        for present in (True, False):
            z = {m: torch.randn(4, 4, requires_grad=True) for m in NAMES}
            criterion(head(z), torch.randint(3, (4,)), torch.tensor([[True, present]] * 4))
            if present:
                want = criterion.stats
    history.end_epoch()
    assert history.series("count", "held_out").tolist() == [[8, 8, 4]]
    torch.testing.assert_close(history.series("loss", "held_out")[0, 2], want.loss[2].double())


def test_evaluation_in_inference_mode_and_without():
    history, head, criterion = History(), ConcatHead(dict.fromkeys(NAMES, 4), 3), ARLLoss().eval()
    criterion.track(history)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            criterion(head({m: torch.randn(4, 4, requires_grad=True) for m in NAMES}), torch.randint(3, (4,)))
        history.end_epoch()
    assert history.series("count", "held_out")[:, 0].tolist() == [4, 4, 4]
    assert history.step == 0


def test_a_copy_of_the_criterion_has_a_history_of_its_own():
    head, criterion = ConcatHead(dict.fromkeys(NAMES, 4), 3), ARLLoss()
    history = criterion.track(every=3)
    for c in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        c(head({m: torch.randn(4, 4, requires_grad=True) for m in NAMES}), torch.randint(3, (4,)))
        assert c.history.step == 1
    assert criterion.history is history
    assert history.step == 1
    assert set(criterion.state_dict()) == {"steps"}


def test_memory_is_bounded_and_averages_are_means():
    history, limit = History(NAMES, every=100, limit=32), 32
    values = torch.rand(10_037, dtype=torch.float64)
    stats = random_stats()
    for value in values:
        history.append(stats._replace(gains=torch.stack([value, value])))
    rows = history.rows()
    assert 16 <= len(rows["step"]) <= limit
    stride = history.stride
    assert stride == 512
    want = [part.mean() for part in values.split(stride)]
    torch.testing.assert_close(rows["gain/audio"], torch.stack(want), rtol=1e-12, atol=0)
    assert rows["step"].tolist() == [min(i, 10_037) - 1 for i in range(stride, 10_037 + stride, stride)]


@pytest.mark.parametrize("limit", [2, 3, 5, 8])
@pytest.mark.parametrize("steps", [1, 7, 23, 64])
def test_every_limit_keeps_the_mean(limit, steps):
    history = History(every=4, limit=limit)
    stats = [random_stats() for _ in range(steps)]
    for s in stats:
        history.append(s)
    kept = history.series("loss")
    assert len(kept) <= limit
    weight = torch.full((len(kept), 1), float(history.stride))
    weight[-1] = steps - history.stride * (len(kept) - 1)
    torch.testing.assert_close((kept * weight).sum(0) / steps, torch.stack([s.loss for s in stats]).mean(0))


def test_a_resumed_run_goes_on(tmp_path):
    """Saved in the middle of an epoch and of the buffer; the same in memory, by pickle and by deepcopy."""
    stats = [random_stats(dtype=torch.float32) for _ in range(20)]
    whole = History(NAMES, every=3, limit=8)
    half = History(NAMES, every=3, limit=8)

    def feed(history, part):
        for i in part:
            history.append(stats[i])
            history.append_held_out(stats[i])
            if i % 6 == 5:
                history.log_weights([1.0, i])
                history.end_epoch()

    feed(whole, range(20))
    feed(half, range(10))
    half.save(tmp_path / "history.pt")
    loaded = History.load(tmp_path / "history.pt", every=3, limit=8)
    others = [half, loaded, pickle.loads(pickle.dumps(half)), copy.deepcopy(half)]
    for history in others:
        feed(history, range(10, 20))
        assert (history.step, history.epoch) == (20, 3)
        for kind in ("train", "epochs", "held_out", "weights"):
            for name, column in whole.rows(kind).items():
                torch.testing.assert_close(
                    history.rows(kind)[name], column, rtol=1e-12, atol=0, msg=f"{kind} {name}"
                )
    with pytest.raises(ValueError, match="state: expected what"):
        whole.load_state_dict({})


def test_nothing_waits_for_a_copy_that_is_under_way():
    """Copies whose event has not come are left alone, in order, until the history is read."""

    class Event:
        done, waited = False, 0

        def query(self):
            return self.done

        def synchronize(self):
            self.waited += 1
            self.done = True

    event = Event()
    history = History(NAMES, every=2)
    stats = [random_stats() for _ in range(7)]
    for s in stats[:2]:
        history.append(s)
    history._arriving = deque(chunk._replace(arrived=event) for chunk in history._arriving)
    for s in stats[2:]:
        history.append(s)
    history.end_epoch()
    assert event.waited == 0
    assert len(history._arriving) == 5  # three full buffers, the rest, the end of the epoch
    assert torch.equal(history.series("loss"), torch.stack([s.loss for s in stats]))
    assert event.waited == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_on_a_gpu():
    head = ConcatHead(dict.fromkeys(NAMES, 4), 3).cuda()
    criterion = ARLLoss()
    history = criterion.track(every=4)
    z, y = {m: torch.randn(6, 4, device="cuda") for m in NAMES}, torch.randint(3, (6,), device="cuda")
    kept = []
    criterion(head(z), y).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            criterion(head(z), y).backward()
            kept.append(criterion.stats)
            criterion.metrics()
        history.end_epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(history.series("gains")[1:], torch.stack([s.gains for s in kept]).double().cpu())


def test_metrics_have_a_name_each():
    _, _, _, head = training()
    criterion = ARLLoss()
    assert criterion.metrics() == {}
    criterion(head({m: torch.randn(6, 4, requires_grad=True) for m in NAMES}), torch.randint(3, (6,)))
    metrics = criterion.metrics()
    stats = criterion.stats
    assert len(metrics) == 21
    assert torch.equal(metrics["arl/gain/audio"], stats.gains[0])
    assert torch.equal(metrics["arl/accuracy/fused"], stats.accuracy[0])
    assert torch.equal(metrics["arl/coefficient/visual"], stats.coefficients[1])
    assert torch.equal(metrics["arl/count/visual"], stats.count[2])
    assert not any(value.requires_grad or value.dim() for value in metrics.values())
    assert list(criterion.metrics(prefix=""))[:3] == ["loss/fused", "loss/audio", "loss/visual"]
    out = head({m: torch.randn(6, 4) for m in NAMES})
    criterion((out.fused, list(out.unimodal.values()), out.link), torch.randint(3, (6,)))
    assert "arl/gain/1" in criterion.metrics()


def test_a_linear_head_with_its_loss_is_tracked_too():
    head, criterion = ConcatHead(dict.fromkeys(NAMES, 4), 3), ARLLoss()
    history = criterion.track(every=2)
    head.loss({m: torch.randn(6, 4, requires_grad=True) for m in NAMES}, torch.randint(3, (6,)), criterion)
    assert (history.step, history.modalities) == (1, NAMES)
    assert criterion.history is history
    criterion.untrack()
    head.loss({m: torch.randn(6, 4, requires_grad=True) for m in NAMES}, torch.randint(3, (6,)), criterion)
    assert history.step == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_criterion_is_tracked(backend):
    """One graph, and each of its runs gives a row per call; also in evaluation, and for another history."""
    torch.compiler.reset()
    head, criterion = ConcatHead(dict.fromkeys(NAMES, 4), 3), ARLLoss(entropy_floor=0.1)
    history = criterion.track(every=2)
    frames = []

    def step(z, y):
        return criterion(head(z), y) + criterion(head(z), (y + 1) % 3)

    def counted(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, backend=counted)

    def run(compiled, rows=6):
        torch.manual_seed(len(rows_seen))
        z = {m: torch.randn(rows, 4, requires_grad=True) for m in NAMES}
        loss = compiled(z, torch.randint(3, (rows,)))
        if loss.requires_grad:
            loss.backward()
        rows_seen.append(rows)

    rows_seen: list[int] = []
    for _ in range(5):
        run(compiled)
    assert len(frames) == 1
    assert (history.step, history.names, history.entropy_floor) == (10, NAMES, 0.1)
    criterion.eval()
    with torch.no_grad():
        run(compiled)
    history.end_epoch()

    eager = criterion.train().track()
    rows_seen.clear()
    for _ in range(5):
        run(step)
    criterion.eval()
    with torch.no_grad():
        run(step)
    eager.end_epoch()
    for kind in ("train", "held_out"):
        want = eager.rows(kind)
        assert len(want["step"]) == (10 if kind == "train" else 1)
        for name, column in history.rows(kind).items():
            torch.testing.assert_close(column, want[name], rtol=1e-5, atol=1e-6, msg=name)

    criterion.train().untrack()
    run(compiled)
    copied = copy.deepcopy(history)
    criterion.track(copied)
    run(compiled)
    assert (history.step, eager.step, copied.step) == (10, 10, 12)


@pytest.mark.parametrize(("modalities", "floor"), [(2, None), (3, None), (4, 0.1), (2, 0.0), (3, 0.9)])
def test_bounds_of_q_are_those_of_the_rule(modalities, floor):
    """No entropies give a q outside, and the extreme ones give the bounds."""
    history = History()
    history.entropy_floor = floor
    x = (
        torch.randn(modalities, 50, 5, dtype=torch.float64)
        * torch.logspace(-2, 1, 50, dtype=torch.float64)[:, None]
    )
    y = torch.zeros(1, dtype=torch.long)
    seen = []
    for row in range(50):
        _, stats = arl_fast.arl_loss(x[0, row][None], list(x[:, row, None]), y, entropy_floor=floor)
        seen.append(stats.inverse_variance)
        history.append(stats)
    flat, sharp = torch.zeros(1, 5, dtype=torch.float64), 1e4 * torch.eye(5, dtype=torch.float64)[:1]
    for logits in ([flat] + [sharp] * (modalities - 1), [sharp] + [flat] * (modalities - 1)):
        seen.append(arl_fast.arl_loss(flat, logits, y, entropy_floor=floor)[1].inverse_variance)
    low, high = history.q_bounds()
    seen = torch.stack(seen)
    assert float(seen.min()) == pytest.approx(low, abs=1e-9)
    assert float(seen.max()) == pytest.approx(high, abs=1e-9)


def test_marks_steps_at_the_bounds():
    history = History(every=2)
    base = random_stats(dtype=torch.float32)
    for entropy, a in [([0.5, 0.5], [0.5, 0.5]), ([0.1, 0.9], [0.5, 0.5]), ([0.5, 0.5], [0.995, 0.005])]:
        history.append(base._replace(entropy=torch.tensor(entropy), coefficients=torch.tensor(a)))
    assert history.rows()["floored"].tolist() == [0, 1, 0]
    assert history.rows()["saturated"].tolist() == [0, 0, 1]


def test_live_table_has_one_line_for_each_epoch():
    out = io.StringIO()
    history, *_ = training(History(live=out), epochs=3)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[1].split() == ["epoch", "steps", *["fused", "audio", "visual"] * 3, "audio", "visual"]
    assert [line.split()[:2] for line in lines[2:]] == [["0", "5"], ["1", "10"], ["2", "15"]]
    accuracy = history.series("accuracy", "held_out")[-1, 0]
    assert float(lines[-1].split()[8]) == pytest.approx(100 * float(accuracy), abs=0.05)
    assert all(len(line) <= 110 for line in lines)


def test_wrong_input_is_named():
    history = History(NAMES)
    with pytest.raises(TypeError, match="stats: got NoneType, expected BranchStats"):
        history.append(None)
    with pytest.raises(
        ValueError, match=r"names: got \['audio', 'visual'\], but the statistics are those of 3"
    ):
        history.append(random_stats(3))
    history.append(random_stats())
    with pytest.raises(ValueError, match="stats: got those of 3 modalities, but this history holds 2"):
        history.append(random_stats(3))
    with pytest.raises(ValueError, match="weights: got 3 of them, expected 2"):
        history.log_weights([1, 2, 3])
    with pytest.raises(ValueError, match="kind: got 'test', expected one of 'train'"):
        history.rows("test")
    with pytest.raises(ValueError, match="field: got 'gain', expected one of 'loss'"):
        history.series("gain")
    with pytest.raises(ValueError, match="every: got 0, expected a whole number >= 1"):
        History(every=0)
    with pytest.raises(ValueError, match="track: got a history and"):
        ARLLoss().track(history, every=3)
    with pytest.raises(ValueError, match="no epoch with a training step has ended"):
        History().line()


def test_is_a_sequence_of_stats_for_the_older_plots():
    pytest.importorskip("matplotlib").use("Agg")
    history, steps, _, _ = training(History(every=4))
    assert len(history) == 10
    assert torch.equal(history[-1].gains, steps[-1].gains.double())
    assert [float(s.loss[0]) for s in history] == [float(s.loss[0]) for s in steps]
    lines = [plots.shares(h, NAMES).lines[0].get_ydata() for h in (history, steps)]
    assert list(lines[0]) == pytest.approx(list(lines[1]))
    plots.coefficients([history, history])


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_plot_shows_shares_bounds_and_weights(modalities):
    plt = pytest.importorskip("matplotlib.pyplot")
    history = History([f"m{i}" for i in range(modalities)])
    with pytest.raises(ValueError, match="history: got no step to draw"):
        history.plot()
    for _ in range(8):
        history.append(random_stats(modalities))
        history.append_held_out(random_stats(modalities))
    history.log_weights(torch.ones(modalities))
    history.end_epoch()
    figure = history.plot("a run")
    if modalities == 1:
        assert len(figure.axes) == 4
        return
    labels = {text.get_text() for ax in figure.axes for text in ax.get_legend().get_texts()}
    assert {"m1: fusion weight", "m0: coefficient a", "m0: gain", "held out", "fused"} <= labels
    first = figure.axes[0]
    if modalities == 2:
        drawn = [float(line.get_ydata()[0]) for line in first.lines if line.get_linestyle() == ":"]
        assert drawn == pytest.approx([3 / 13, 10 / 13])
    else:
        assert len(first.collections) == 3  # stacked areas
        assert "Dependence" in first.get_title()
    plt.close("all")


def test_to_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    history, *_ = training()
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["gain/audio"].tolist() == history.to_dict()["gain/audio"]
