"""History: what the statistics of a training run were, collected without waiting for the device.

Every step writes one row into a buffer on the device. When the buffer is full, it is copied to the host
without blocking, and read there when the copy has arrived. On the host the rows go into tables of bounded
length: a full table averages its rows in pairs, so that millions of steps take as much memory as a few
thousand.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from ._core.spec import BranchStats
from ._core.stats import unpack

SATURATED = 0.99  # a coefficient above this share of all leaves the other modalities next to nothing

# BranchStats' fields in the singular, as loggers show them, and whether they have an entry for the fused
# branch.
NAMES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "entropy": "entropy",
    "dependence": "dependence",
    "inverse_variance": "inverse_variance",
    "dependence_share": "dependence_share",
    "coefficients": "coefficient",
    "gains": "gain",
    "count": "count",
}
OF_BRANCHES = ("loss", "accuracy", "count")


def metric_names(modalities: Sequence[str]) -> list[str]:
    """Names of BranchStats' values in their order: "loss/fused", "loss/audio", ..., "gain/audio", ..."""
    branches = ["fused", *modalities]
    return [
        f"{name}/{who}"
        for field, name in NAMES.items()
        for who in (branches if field in OF_BRANCHES else modalities)
    ]


def metrics(
    stats: BranchStats | None, modalities: Sequence[str] | None, prefix: str = "arl/"
) -> dict[str, Tensor]:
    """Every statistic under a name of its own: detached 0-d tensors on their device, not read back.

    Args:
        stats: of a criterion's last call; None, before the first, gives an empty dict.
        modalities: their names, in the order of the unimodal logits; None: "0", "1", ...
        prefix: before every name: "arl/gain/audio", "arl/accuracy/fused", ...
    """
    if stats is None:
        return {}
    names = metric_names(_default_names(modalities, len(stats.gains)))
    return {prefix + name: value for name, value in zip(names, torch.cat(stats).unbind(), strict=True)}


def _default_names(names: Sequence[str] | None, modalities: int) -> list[str]:
    if names is None:
        return [str(m) for m in range(modalities)]
    if len(names) != modalities:
        raise ValueError(f"names: got {list(names)}, but the statistics are those of {modalities} modalities")
    return [str(name) for name in names]


class History:
    """The statistics of every training step of a run, and of its evaluations, one mean per epoch.

        history = criterion.track()        # from now on every call of the criterion is collected
        for epoch in range(epochs):
            ...                            # train, evaluate
            history.end_epoch()
        history.plot().savefig("run.png")

    Or without ``track``: ``history.append(criterion.stats)`` after each step, which is also the way if the
    criterion runs inside a CUDA graph. A step is one training call of the criterion: with accumulation, one
    micro-batch. With several processes each collects its own. Inside ``torch.compile`` a tracked criterion
    stays one graph, and every run of it is collected.

    As a sequence it holds one BranchStats, on the host, per kept row, so that it serves wherever a list of
    BranchStats does.

    Args:
        names: of the modalities; None: those of the criterion that is tracked, or "0", "1", ...
        every: number of steps that stay on the device before they are copied to the host, without blocking.
        limit: largest number of rows kept. When a table is full, its rows are averaged in pairs: after n
            steps each row is the mean of at most 2 n / limit steps.
        live: print a table, one line at each ``end_epoch``: True for standard output, or a text stream.

    Attributes:
        step, epoch: numbers of steps appended and of epochs ended so far.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        every: int = 256,
        limit: int = 4096,
        live: bool | TextIO = False,
    ) -> None:
        _at_least("every", every, 1)
        _at_least("limit", limit, 2)
        self.names = None if names is None else [str(name) for name in names]
        self.every = every
        self.limit = limit
        self.live = live
        self.entropy_floor: float | None = None
        self.step = 0
        self.epoch = 0
        self._modalities = 0
        self._table_begun = False
        self._train: _Ring | None = None
        self._held_out: _Ring | None = None
        self._arriving: deque[_Chunk] = deque()
        self._tables = {kind: _Table(limit) for kind in ("train", "epochs", "held_out", "weights")}
        self._sums: dict[str, Tensor | None] = {"train": None, "held_out": None}
        self._key = next(_keys)
        self._recorded = torch.zeros((), dtype=torch.int64)  # calls from compiled graphs
        _histories[self._key] = self

    # --- collecting -----------------------------------------------------------------------------------------

    def append(self, stats: BranchStats) -> None:
        """Add the statistics of a training step: one small copy on their device, which nothing waits for."""
        self._check(stats)
        self._train = self._write(self._train, stats, "train")
        self.step += 1

    def append_held_out(self, stats: BranchStats) -> None:
        """Add those of one evaluation batch. They become one mean per epoch, weighted by rows."""
        self._check(stats)
        self._held_out = self._write(self._held_out, stats, "held_out")

    def observe(self, criterion: Any) -> None:
        """Add a criterion's last call: to the steps if it was training, else to the held-out batches."""
        training = criterion.training and torch.is_grad_enabled()
        names = [str(name) for name in criterion.modalities or ()]
        floor = criterion.options.entropy_floor
        if torch.compiler.is_compiling():
            torch.ops.arl_fast.record(self._recorded, criterion._packed, self._key, training, names, floor)
        else:
            self._observe(criterion.stats, training, names, floor)

    def _observe(self, stats: BranchStats, training: bool, names: list[str], floor: float | None) -> None:
        self.names = self.names or names or None
        self.entropy_floor = floor
        if training:
            self.append(stats)
        else:
            self.append_held_out(stats)

    def log_weights(self, weights: Tensor | Sequence[float], epoch: int | None = None) -> None:
        """Remember one weight per modality, as ``FusionWeights.weights``, to be drawn beside q and d.

        Args:
            weights: [M]; may be on any device, and is read back here.
            epoch: None: the current one.
        """
        row = torch.as_tensor(weights).detach().to("cpu", torch.float64).reshape(-1)
        if self._modalities and len(row) != self._modalities:
            raise ValueError(
                f"weights: got {len(row)} of them, expected {self._modalities}, one per modality"
            )
        when = self.epoch if epoch is None else epoch
        self._tables["weights"].extend(
            torch.cat([torch.tensor([self.step, when], dtype=torch.float64), row])[None]
        )

    def end_epoch(self) -> None:
        """Close the epoch: its mean becomes one row of the epochs, and a live table gets its line."""
        for ring in (self._train, self._held_out):
            self._send(ring)
        self._arriving.append(_Chunk("end", None, None, self.step, self.epoch))
        self.epoch += 1
        if self.live:
            self.collect()
            self._print_line()
        else:
            self._receive(wait=False)

    def end_evaluation(self) -> None:
        """Close the evaluation before its epoch ends: for more than one of them in an epoch."""
        self._send(self._held_out)
        self._arriving.append(_Chunk("evaluated", None, None, self.step, self.epoch))
        self._receive(wait=False)

    def _check(self, stats: BranchStats) -> None:
        if not isinstance(stats, BranchStats):
            raise TypeError(
                f"stats: got {type(stats).__name__}, expected BranchStats (criterion.stats, after a call)"
            )
        modalities = stats.gains.shape[0]
        if self._modalities != modalities:
            if self._modalities:
                raise ValueError(
                    f"stats: got those of {modalities} modalities, but this history holds {self._modalities}"
                )
            self.names = None if self.names is None else _default_names(self.names, modalities)
            self._modalities = modalities

    def _write(self, ring: _Ring | None, stats: BranchStats, kind: str) -> _Ring:
        like = stats.loss
        if ring is None or ring.device != like.device or ring.dtype != like.dtype:
            self._send(ring)
            with torch.inference_mode(False):  # a buffer made there could only be written to there
                ring = _Ring(kind, self.every, 9 * self._modalities + 3, like.device, like.dtype)
        if ring.write(stats):
            self._send(ring, self.step + (kind == "train"))
        return ring

    def _send(self, ring: _Ring | None, step: int | None = None) -> None:
        if ring is not None and ring.filled:
            self._receive(wait=False)
            self._arriving.append(ring.send(self.step if step is None else step, self.epoch))

    def _receive(self, wait: bool) -> None:
        """Take in what has arrived on the host, in order; with ``wait`` all of it."""
        while self._arriving:
            chunk = self._arriving[0]
            if chunk.arrived is not None and not chunk.arrived.query():
                if not wait:
                    return
                chunk.arrived.synchronize()
            self._arriving.popleft()
            if chunk.rows is None:
                self._close(chunk)
            else:
                self._take_in(chunk, chunk.rows)

    def collect(self) -> None:
        """Bring everything to the host, which waits for the device. Every method that reads calls this."""
        for ring in (self._train, self._held_out):
            self._send(ring)
        self._receive(wait=True)

    def _take_in(self, chunk: _Chunk, rows: Tensor) -> None:
        """Rows of statistics [n, K], those of steps into their table, all into the epoch's sums."""
        rows = rows.to(torch.float64)
        fields = self._split(rows)
        rows = torch.cat([self._at_the_bounds(fields), rows], 1)
        weight = torch.ones_like(rows)
        if chunk.kind == "train":
            steps = torch.arange(chunk.step - len(rows), chunk.step, dtype=torch.float64)
            self._tables["train"].extend(
                torch.cat([torch.stack([steps, torch.full_like(steps, chunk.epoch)], 1), rows], 1)
            )
        else:  # the statistics are means over a batch's rows, and its weight is the number of these
            weight[:, 2:] = torch.cat(
                [fields.count, fields.count, *[fields.count[:, 1:]] * 6, torch.ones_like(fields.count)], 1
            )
            rows = rows.where(weight > 0, 0)
        sums = torch.stack([(rows * weight).sum(0), weight.sum(0)])
        before = self._sums[chunk.kind]
        self._sums[chunk.kind] = sums if before is None else before + sums

    def _close(self, chunk: _Chunk) -> None:
        """The sums of an epoch, or of its evaluation only, become a row."""
        for kind, table in (("train", "epochs"), ("held_out", "held_out"))[chunk.kind == "evaluated" :]:
            sums, self._sums[kind] = self._sums[kind], None
            if sums is not None:
                row = sums[0] / sums[1].clamp_min(1)
                if kind == "held_out":  # numbers of rows add up
                    row[-(self._modalities + 1) :] = sums[0, -(self._modalities + 1) :]
                marks = torch.tensor([chunk.step, chunk.epoch], dtype=torch.float64)
                self._tables[table].extend(torch.cat([marks, row])[None])

    def _at_the_bounds(self, stats: BranchStats) -> Tensor:
        """[n, 2] of 0 and 1: whether the entropy floor holds, whether a coefficient is nearly 1."""
        share = stats.entropy / stats.entropy.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        present = stats.count[:, 1:] > 0
        floor = self._floor(present.sum(1, keepdim=True))
        floored = ((share < floor) & present).any(1)
        a = stats.coefficients  # OGM's do not sum to 1, so that the others' sum is looked at too
        saturated = ((a > SATURATED) & (a.sum(1, keepdim=True) - a < 1 - SATURATED)).any(1)
        saturated &= present.sum(1) > 1
        return torch.stack([floored, saturated], 1).double()

    def _floor(self, modalities: Any) -> Any:
        return 0.6 / modalities if self.entropy_floor is None else self.entropy_floor

    # --- reading --------------------------------------------------------------------------------------------

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities, in order; empty before the first step."""
        return _default_names(self.names, self._modalities)

    def q_bounds(self) -> tuple[float, float]:
        """Smallest and largest q that the entropy floor allows: 0.23 and 0.77 for two modalities."""
        others = self._modalities - 1
        floor = max(float(self._floor(self._modalities)), 1e-12)
        if not others:
            return 1.0, 1.0
        smallest = 1 / (1 + others / floor)  # all entropy in this modality, the others at the floor
        # none in it; it is largest if the rest is shared by as many others as lie above the floor then
        largest = 1 / (
            1 + floor * min(n / max(1 / n, floor) + (others - n) / floor for n in range(1, others + 1))
        )
        return smallest, largest

    def rows(self, kind: str = "train") -> dict[str, Tensor]:
        """Columns [rows] of float64, on the host.

        Args:
            kind: "train": the steps, or means of as many neighbouring ones as ``stride`` says. "epochs": the
                means of each epoch that has ended. "held_out": the same of its evaluation. "weights": what
                ``log_weights`` was given.

        Returns:
            "step" and "epoch" of the row's last step; for all but "weights" also "floored" and "saturated",
            the shares of its steps in which the entropy floor held and in which a coefficient was above 0.99,
            and every statistic by name: "loss/fused", "gain/audio", ...
        """
        if kind not in self._tables:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, self._tables))}")
        self.collect()
        values = self._tables[kind].values()
        if kind == "weights":
            columns = ["step", "epoch", *(f"weight/{name}" for name in self._weight_names(values))]
        else:
            columns = ["step", "epoch", "floored", "saturated", *metric_names(self.modalities)]
        if not len(values):
            return {name: torch.zeros(0, dtype=torch.float64) for name in columns}
        return dict(zip(columns, values.unbind(1), strict=True))

    def _weight_names(self, values: Tensor) -> list[str]:
        return _default_names(self.names, values.shape[1] - 2) if len(values) else self.modalities

    @property
    def stride(self) -> int:
        """Number of steps of which each row of the training steps is the mean."""
        return self._tables["train"].stride

    def series(self, field: str, kind: str = "train") -> Tensor:
        """A field of BranchStats [rows, M] or [rows, M+1], float64, on the host; ``kind`` as for ``rows``."""
        if field not in BranchStats._fields:
            raise ValueError(
                f"field: got {field!r}, expected one of {', '.join(map(repr, BranchStats._fields))}"
            )
        self.collect()
        values = self._tables[kind].values()
        if not len(values):
            return torch.zeros(0, self._modalities + (field in OF_BRANCHES), dtype=torch.float64)
        return getattr(self._split(values[:, 4:]), field)

    def _split(self, values: Tensor) -> BranchStats:
        m = self._modalities
        return BranchStats(*values.split([m + 1, m + 1, *[m] * 6, m + 1], -1))

    def __len__(self) -> int:
        self.collect()
        return len(self._tables["train"].values())

    def __getitem__(self, index: int) -> BranchStats:
        self.collect()
        return self._split(self._tables["train"].values()[index, 4:])

    def __iter__(self) -> Iterator[BranchStats]:
        self.collect()
        return iter([self._split(row) for row in self._tables["train"].values()[:, 4:]])

    def to_dict(self, kind: str = "train") -> dict[str, list[float]]:
        """``rows`` as plain lists."""
        return {name: column.tolist() for name, column in self.rows(kind).items()}

    def to_pandas(self, kind: str = "train") -> Any:
        """``rows`` as a pandas.DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("History.to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_dict(kind))

    def plot(self, title: str | None = None) -> Any:
        """One figure of the run (``arl_fast.plots.overview``); returns it. Needs matplotlib."""
        from . import plots

        return plots.overview(self, title)

    # --- the table in the terminal --------------------------------------------------------------------------

    def line(self, header: bool = False) -> str:
        """The last epoch as a line of a table (nats and percent), or the table's two lines of headings."""
        names = self.modalities
        width = max(7, *(len(name) + 1 for name in names), 0)
        held_out = self.rows("held_out")
        groups = {"loss": ["fused", *names], "train accuracy": ["fused", *names]}
        if len(held_out["step"]):
            groups["held-out accuracy"] = ["fused", *names]
        groups["gain"] = names
        if header:
            top = " " * 13 + "".join(
                "  " + title[: width * len(own)].ljust(width * len(own)) for title, own in groups.items()
            )
            return (
                top.rstrip()
                + "\n"
                + "epoch   steps"
                + "".join("  " + "".join(f"{w:>{width}}" for w in own) for own in groups.values())
            )
        epochs = self.rows("epochs")
        if not len(epochs["step"]):
            raise ValueError(
                "history: no epoch with a training step has ended, so that there is no line to show"
            )
        text = f"{int(epochs['epoch'][-1]):>5}{int(epochs['step'][-1]):>8}"
        for title, own in groups.items():
            source = held_out if title == "held-out accuracy" else epochs
            cells = [float(source[f"{title.split()[-1]}/{who}"][-1]) for who in own]
            shown = [f"{100 * c:.1f}" if "accuracy" in title else f"{c:.3f}" for c in cells]
            text += "  " + "".join(f"{cell:>{width}}" for cell in shown)
        return text

    def _print_line(self) -> None:
        out = sys.stdout if self.live is True else self.live
        if not len(self._tables["epochs"].values()):
            return
        if not self._table_begun:
            self._table_begun = True
            print(self.line(header=True), file=out)  # type: ignore[arg-type]
        print(self.line(), file=out, flush=True)  # type: ignore[arg-type]

    # --- keeping --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything collected: tensors, numbers and strings, as ``torch.load(weights_only=True)`` takes."""
        self.collect()
        return {
            "version": 1,
            "names": self.names,
            "entropy_floor": self.entropy_floor,
            "step": self.step,
            "epoch": self.epoch,
            "modalities": self._modalities,
            "tables": {kind: table.state() for kind, table in self._tables.items()},
            "sums": dict(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the run that saved ``state`` had stopped; what has been collected so far is dropped."""
        if not isinstance(state, Mapping) or state.get("version") != 1:
            raise ValueError("state: expected what History.state_dict() returned")
        self._train = self._held_out = None
        self._arriving.clear()
        self.names = state["names"]
        self.entropy_floor = state["entropy_floor"]
        self.step, self.epoch, self._modalities = state["step"], state["epoch"], state["modalities"]
        self._tables = {kind: _Table(self.limit, saved) for kind, saved in state["tables"].items()}
        self._sums = dict(state["sums"])

    def save(self, path: Any) -> None:
        """Write ``state_dict`` to a file, with torch.save."""
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: Any, **options: Any) -> History:
        """A history from a file that ``save`` wrote; ``options`` are those of the constructor."""
        history = cls(**options)
        history.load_state_dict(torch.load(path, weights_only=True))
        return history

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: events and pinned memory are not copied, what they hold is."""
        options = {
            "every": self.every,
            "limit": self.limit,
            "live": self.live if isinstance(self.live, bool) else False,
        }
        return {"options": options, "state": self.state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(**saved["options"])  # type: ignore[misc]
        self.load_state_dict(saved["state"])

    def __repr__(self) -> str:
        return f"History({self.modalities}, step={self.step}, epoch={self.epoch})"


# A compiled graph calls a history through an op, which finds it by its number. It writes to one of its
# arguments, so that the compiler neither drops a call nor repeats one.
_keys = itertools.count()
_histories: weakref.WeakValueDictionary[int, History] = weakref.WeakValueDictionary()
_library = torch.library.Library("arl_fast", "FRAGMENT")
_library.define(
    "record(Tensor(a!) calls, Tensor packed, int key, bool training, str[] names, float? entropy_floor) -> ()"
)


def _record(
    calls: Tensor, packed: Tensor, key: int, training: bool, names: list[str], entropy_floor: float | None
) -> None:
    calls.add_(1)
    _histories[key]._observe(unpack(packed), training, names, entropy_floor)


_library.impl("record", _record, "CompositeExplicitAutograd")
torch.library.register_fake("arl_fast::record", lambda *_: None, lib=_library)


class _Chunk(NamedTuple):
    """Rows on their way to the host, or the end of an epoch. ``arrived``: None, or an event."""

    kind: str
    rows: Tensor | None
    arrived: Any
    step: int  # number of steps up to and with the last row
    epoch: int


class _Ring:
    """Rows [every, K] on the device of the statistics, written one by one and sent to the host together."""

    def __init__(self, kind: str, every: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        self.kind, self.device, self.dtype = kind, device, dtype
        self.buffer = torch.empty(every, columns, dtype=dtype, device=device)
        self.slots = self.buffer.unbind(0)
        self.filled = 0
        self.capturing: Callable[[], bool] | None = None
        if device.type == "cuda":
            self.capturing = torch.cuda.is_current_stream_capturing

    def write(self, stats: BranchStats) -> bool:
        """One row; whether the buffer is full now."""
        if self.capturing is not None and self.capturing():
            raise RuntimeError(
                "history: got a step while a CUDA graph is captured, whose replays would all write one row: "
                "call history.append(criterion.stats) after each replay instead"
            )
        torch.cat(stats, out=self.slots[self.filled])
        self.filled += 1
        return self.filled == len(self.slots)

    def send(self, step: int, epoch: int) -> _Chunk:
        """Start the copy of all rows; later writes come after it in the device's own order."""
        rows, self.filled = self.buffer[: self.filled], 0
        if self.device.type == "cpu":
            return _Chunk(self.kind, rows.clone(), None, step, epoch)
        # no memory that such a device could write without blocking
        if self.device.type not in (
            "cuda",
            "xpu",
        ):
            return _Chunk(self.kind, rows.cpu(), None, step, epoch)
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        arrived = torch.Event(self.device)
        arrived.record()
        return _Chunk(self.kind, host, arrived, step, epoch)


class _Table:
    """At most ``limit`` rows [K], each the mean of ``stride`` that were added; its step is the last's."""

    def __init__(self, limit: int, saved: Mapping[str, Any] | None = None) -> None:
        self.limit = limit
        self.stride = 1
        self.full: Tensor | None = None  # [at most limit, K]
        self.partial: Tensor | None = None  # the mean of the rows that do not yet fill a stride, [K]
        self.partial_rows = 0
        if saved is not None:
            self.stride, self.partial_rows = saved["stride"], saved["partial_rows"]
            self.full, self.partial = (
                None if x is None else x.clone() for x in (saved["full"], saved["partial"])
            )
            self._shrink()

    def state(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "full": self.full,
            "partial": self.partial,
            "partial_rows": self.partial_rows,
        }

    def extend(self, rows: Tensor) -> None:
        """Add rows [n, K]."""
        while len(rows):
            if self.partial_rows:
                taken = min(self.stride - self.partial_rows, len(rows))
                self._add_partial(rows[:taken])
                rows = rows[taken:]
                continue
            groups = min(len(rows) // self.stride, self.limit - (0 if self.full is None else len(self.full)))
            if not groups:
                self._add_partial(rows)
                return
            taken = groups * self.stride
            means = rows[:taken].reshape(groups, self.stride, -1).mean(1)
            means[:, :2] = rows[self.stride - 1 : taken : self.stride, :2]
            self._push(means)
            rows = rows[taken:]

    def _add_partial(self, rows: Tensor) -> None:
        self._merge_partial(rows.mean(0), rows[-1, :2], len(rows), behind=True)
        if self.partial_rows == self.stride:
            whole, self.partial, self.partial_rows = self.partial, None, 0
            self._push(whole[None])  # type: ignore[index]

    def _merge_partial(self, mean: Tensor, marks: Tensor, rows: int, behind: bool) -> None:
        """Take the mean of so many rows, which come behind or before its own, into the unfinished row."""
        if self.partial is not None:
            marks = marks if behind else self.partial[:2]
            mean = self.partial + (mean - self.partial) * (rows / (self.partial_rows + rows))
        self.partial = torch.cat([marks, mean[2:]])
        self.partial_rows += rows

    def _push(self, means: Tensor) -> None:
        self.full = means.clone() if self.full is None else torch.cat([self.full, means])
        self._shrink()

    def _shrink(self) -> None:
        """Average neighbours until there is room for another row."""
        while self.full is not None and len(self.full) >= self.limit:
            if len(self.full) % 2:  # the last row has no neighbour: it waits for the rows to come
                self._merge_partial(self.full[-1], self.full[-1, :2], self.stride, behind=False)
                self.full = self.full[:-1]
            pairs = self.full.view(len(self.full) // 2, 2, -1)
            self.full = pairs.mean(1)
            self.full[:, :2] = pairs[:, 1, :2]
            self.stride *= 2

    def values(self) -> Tensor:
        """All rows [n, K], the unfinished last one included."""
        parts = ([] if self.full is None else [self.full]) + (
            [] if self.partial is None else [self.partial[None]]
        )
        return torch.cat(parts) if parts else torch.zeros(0, 0, dtype=torch.float64)


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: got {value!r}, expected a whole number >= {low}")
