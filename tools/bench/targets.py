"""The targets that bind, T1 to T17 and those of the multi-rank and control-plane paths, judged by a run's samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from bench.figures import Figures

#: A value, and in words what it was compared with; None where nothing was measured.
Measured = tuple[float, str] | None

_FLOOR = "floor"
_ASYNC_DCP = (
    "dcp.async thread", "dcp.async thread kept", "dcp.async process", "dcp.async process kept",
)  # fmt: skip
_OURS = {"train": "ckptmgr", "moe": "ckptmgr", "export": "ckptmgr export"}
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a target: what is measured, and the most that it may be."""

    target: str
    what: str
    limit: float
    unit: str
    measure: Callable[[Figures], Measured]

    def judge(self, figures: Figures) -> Verdict:
        """Measure it in a run."""
        found = self.measure(figures)
        return Verdict(self, *found) if found is not None else Verdict(self, None, "")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a check."""

    check: Check
    value: float | None
    against: str

    @property
    def word(self) -> str:
        """In a word."""
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.check.limit else "NOT met"


def judge(figures: Figures) -> list[Verdict]:
    """All checks."""
    return [check.judge(figures) for check in CHECKS]


def _times(workload: str, measure: str, *others: str, peer: str = "") -> Callable[[Figures], Measured]:
    """The median as a multiple of the best of the *others*."""
    return lambda figures: figures.ratio(workload, measure, peer or _OURS[workload], others)


def _times_the_best(
    workload: str, measure: str, chosen: Callable[[dict[str, object]], object] = lambda _: True
) -> Callable[[Figures], Measured]:
    """The same against the best of all peers of which *chosen* holds; variants of ckptmgr and the floor are none."""

    def measured(figures: Figures) -> Measured:
        names = [
            name
            for name in figures.peers(workload)
            if not name.startswith(("ckptmgr", _FLOOR)) and chosen(figures.results.peers[workload][name])
        ]
        return figures.ratio(workload, measure, _OURS[workload], names)

    return measured


def _plain(workload: str, measure: str, factor: float = 1.0, peer: str = "") -> Callable[[Figures], Measured]:
    """The median itself."""

    def measured(figures: Figures) -> Measured:
        found = figures.get(workload, peer or _OURS.get(workload, "ckptmgr"), measure)
        return (found.median * factor, f"n = {found.count}") if found is not None else None

    return measured


def _first(figures: Figures, workload: str) -> Measured:
    first, steady = (figures.median(workload, _OURS[workload], word) for word in ("first_stall_s", "stall_s"))
    return (first / steady, "its own steady saves") if first is not None and steady else None


def _extra_memory(workload: str, helpers: int) -> Callable[[Figures], Measured]:
    """Peak extra memory less 30 MiB for each helper, as a multiple of the staged bytes."""

    def measured(figures: Figures) -> Measured:
        extra, state = figures.median(workload, _OURS[workload], "extra_bytes"), figures.state_bytes(workload)
        if extra is None or not state:
            return None
        return (extra - helpers * 30 * _MIB) / state, f"{extra / _MIB:.0f} MiB for {state / _MIB:.0f} MiB"

    return measured


def _digest_cpu(figures: Figures) -> Measured:
    """User time of the writer process for each GiB: digests, and whatever else it does in user mode."""
    user, state = figures.median("train", "ckptmgr", "helper_user_s"), figures.state_bytes("train")
    return (user / state * (1 << 30), "all user time of the writer") if user is not None and state else None


def _journal_share(figures: Figures) -> Measured:
    spent = [
        value
        for workload in figures.histories()
        if (value := figures.median(workload, "ckptmgr", "journal_on_thread_s")) is not None
    ]
    stall = figures.median("train", "ckptmgr", "stall_s")
    return (max(spent) / stall, "the stall of train") if spent and stall else None


def _worst_history(measure: str, factor: float) -> Callable[[Figures], Measured]:
    """The median in the history in which it is largest."""

    def measured(figures: Figures) -> Measured:
        found = [
            (value * factor, workload.removeprefix("journal, ") + " checkpoints")
            for workload in figures.histories()
            if (value := figures.median(workload, "ckptmgr", measure)) is not None
        ]
        return max(found, default=None)

    return measured


def _flatness(measure: str) -> Callable[[Figures], Measured]:
    """How many times the median in the longest history is that in the shortest."""

    def measured(figures: Figures) -> Measured:
        names = figures.histories()
        values = [(figures.median(name, "ckptmgr", measure), name) for name in names]
        known = [(value, name) for value, name in values if value]
        if len(known) < 2:
            return None
        (least, shortest), (most, longest) = known[0], known[-1]
        assert least is not None
        assert most is not None
        return most / least, f"{longest.rpartition(' ')[2]} against {shortest.rpartition(' ')[2]} checkpoints"

    return measured


def _listing(figures: Figures) -> Measured:
    """Finding the newest by the journal as a part of finding it by listing, in the longest history."""
    names = figures.histories()
    if not names:
        return None
    find, listing = (figures.median(names[-1], "ckptmgr", word) for word in ("find_s", "listing_s"))
    return (find / listing, f"listing, {names[-1].rpartition(' ')[2]} checkpoints") if find and listing else None


def _ranks(kind: str, world: int, measure: str, peer: str, *others: str) -> Callable[[Figures], Measured]:
    return lambda figures: figures.ratio(f"{kind}, {world} ranks", measure, peer, others)


def _small_flat(world: int) -> Callable[[Figures], Measured]:
    def measured(figures: Figures) -> Measured:
        one, more = (
            figures.median(f"small tensors, {n} ranks", "ckptmgr", "stall_s") for n in (1, world)
        )  # fmt: skip
        return (more / one, "1 rank") if one and more else None

    return measured


def _slower_than_threads(figures: Figures) -> Measured:
    """How much the training is slowed, less the smallest value of any peer that works in a thread."""
    mine = figures.median("train", "ckptmgr", "slowed")
    lows = [
        (found.low, name)
        for name in figures.peers("train")
        if figures.results.peers["train"][name].get("in_thread") and (found := figures.get("train", name, "slowed"))
    ]
    return (mine - min(lows)[0], f"lowest of {min(lows)[1]}") if mine is not None and lows else None


def _both(figures: Figures) -> Measured:
    return figures.ratio("train", "lost_s", "ckptmgr both", ("ckptmgr",))


def _both_stall(figures: Figures) -> Measured:
    return figures.ratio("train", "stall_s", "ckptmgr both", ("ckptmgr",))


def _many(figures: Figures) -> Measured:
    """0 if the most tensors were saved without an error, 1 if not."""
    names = figures.workloads("moe ")
    if not names:
        return None
    about = figures.results.peers[names[-1]].get("ckptmgr", {})
    return float("problem" in about), about.get("problem", f"{names[-1].split()[1]} tensors saved")


def _stock(figures: Figures) -> Measured:
    mine = figures.median("train", "ckptmgr", "load_stock_warm_s")
    other = figures.median("train", "dcp.save", "load_warm_s")
    return (mine / other, "dcp.load of dcp.save's files") if mine and other else None


def _wrong_anywhere(figures: Figures) -> Measured:
    """How many tensors came back other than they were at the save, over all ways of loading ckptmgr's files."""
    found = [
        about["wrong_tensors"]
        for workload in ("train", "export", "moe")
        for peer, about in figures.results.peers.get(workload, {}).items()
        if peer.startswith("ckptmgr") and "wrong_tensors" in about
    ]
    return (float(sum(found)), f"{len(found)} checks, stock readers included") if found else None


def _is_async(about: dict[str, object]) -> object:
    return about.get("asynchronous")


def _is_durable(about: dict[str, object]) -> object:
    return about.get("syncs")


def _is_dcp(about: dict[str, object]) -> object:
    return about.get("family") == "dcp"


def _checks() -> Iterator[Check]:
    times = "×"
    for workload in ("train", "export"):
        yield Check("T1", f"stall, {workload}, to the floor", 1.1, times, _times(workload, "stall_s", _FLOOR))
        yield Check("T1", f"stall, {workload}, to the best peer", 1.05, times, _times_the_best(workload, "stall_s"))
    shipped = ("dcp.async thread", "dcp.async process")
    yield Check("T1", "stall, train, to dcp.async as shipped", 0.25, times, _times("train", "stall_s", *shipped))
    yield Check("T2", "stall, moe, to the floor", 2, times, _times("moe", "stall_s", _FLOOR))
    yield Check("T2", "stall, moe, to the best DCP path", 0.15, times, _times_the_best("moe", "stall_s", _is_dcp))
    yield Check("T2", "most tensors fail to be saved (1 = yes)", 0, "", _many)
    for workload in ("train", "export"):
        yield Check("T3", f"first stall, {workload}, to steady", 1.3, times, lambda f, w=workload: _first(f, w))  # type: ignore[misc]
        yield Check(
            "T3", f"first stall, {workload}, to every asynchronous peer", 0.25, times,
            _times_the_best(workload, "first_stall_s", _is_async),
        )  # fmt: skip
    yield Check("T4", "durable, train, to the floor", 1.1, times, _times("train", "durable_s", _FLOOR))
    yield Check("T4", "durable, train, to dcp.save", 0.7, times, _times("train", "durable_s", "dcp.save"))
    yield Check("T4", "durable, train, to every dcp.async", 0.7, times, _times("train", "durable_s", *_ASYNC_DCP))
    yield Check("T5", "durable, export, to the floor", 1.1, times, _times("export", "durable_s", _FLOOR))
    yield Check(
        "T5", "durable, export, to save_file + fsync", 1.15, times, _times("export", "durable_s", "safetensors")
    )
    yield Check(
        "T5",
        "durable, export, to every asynchronous peer",
        0.75,
        times,
        _times_the_best("export", "durable_s", _is_async),
    )
    yield Check("T5", "durable, export, to DCP's writer", 0.5, times, _times("export", "durable_s", "dcp hf writer"))
    yield Check("T6", "durable, moe, to the floor", 10, times, _times("moe", "durable_s", _FLOOR))
    yield Check("T6", "durable, moe, to dcp.save", 0.05, times, _times("moe", "durable_s", "dcp.save"))
    yield Check("T7", "training slowed", 0.05, "", _plain("train", "slowed"))
    yield Check("T7", "slowed, less the least of thread-based peers", 0, "", _slower_than_threads)
    yield Check("T8", "training lost, train, to the floor", 1.3, times, _times("train", "lost_s", _FLOOR))
    yield Check(
        "T8", "training lost, train, to the best durable peer", 0.6, times,
        _times_the_best("train", "lost_s", _is_durable),
    )  # fmt: skip
    yield Check("T8", "training lost, export, to save_file", 0.8, times, _times("export", "lost_s", "safetensors"))
    for workload in ("train", "export"):
        yield Check(
            "T9", f"extra memory less 30 MiB, {workload}, to the state", 1.05, times, _extra_memory(workload, 1)
        )
        yield Check(
            "T9", f"extra memory, {workload}, to every asynchronous peer", 1, times,
            _times_the_best(workload, "extra_bytes", _is_async),
        )  # fmt: skip
    yield Check("T10", "DCP and export: training lost, to DCP alone", 1.2, times, _both)
    yield Check("T10", "DCP and export: stall, to DCP alone", 1.2, times, _both_stall)
    yield Check("T11", "digests: CPU seconds per GiB", 0.1, "s", _digest_cpu)
    yield Check(
        "T11", "digests: durable, the floor with and without", 1.02, times,
        _times("train", "durable_s", "floor undigested", peer=_FLOOR),
    )  # fmt: skip
    yield Check("T12", "journal on the training thread", 1, "ms", _worst_history("journal_on_thread_s", 1e3))
    yield Check("T12", "the same, as a part of the stall", 0.01, "", _journal_share)
    for number, kind in ((13, "warm"), (14, "cold")):
        limits = (1.5, 0.25, 0.7) if kind == "warm" else (1.1, 0.7, 0.6)
        target, measure = f"T{number}", f"load_{kind}_s"
        yield Check(target, f"{kind} load, verified, to the floor", limits[0], times, _times("train", measure, _FLOOR))
        yield Check(
            target, f"{kind} load, verified, to dcp.load", limits[1], times, _times("train", measure, "dcp.save")
        )
        yield Check(
            target,
            f"{kind} load, verified, to load_file + copy",
            limits[2],
            times,
            _times("train", measure, "xtuner fork"),
        )
        for way, words in (("meanwhile", "verified meanwhile"), ("unverified", "not verified")):
            yield Check(target, f"{kind} load, {words}, to the floor", limits[0], times, _load(way, kind))
    yield Check("T15", "find the newest", 2, "ms", _worst_history("find_s", 1e3))
    yield Check("T15", "find the newest, to listing", 0.01, times, _listing)
    for world in (2, 4):
        yield Check(
            "T16",
            f"stall, {world} ranks, to the copy alone",
            1.3,
            times,
            _ranks("fsdp", world, "stall_s", "ckptmgr", "copy"),
        )
        kept = "dcp.async thread kept"
        yield Check(
            "T16", f"stall, {world} ranks, to {kept}", 0.7, times, _ranks("fsdp", world, "stall_s", "ckptmgr", kept)
        )
        yield Check(
            "T16",
            f"durable, {world} ranks, to {kept}",
            0.75,
            times,
            _ranks("fsdp", world, "durable_s", "ckptmgr", kept),
        )
        yield Check("T16", f"stall, small tensors, {world} ranks, to 1 rank", 1.1, times, _small_flat(world))
    yield Check("T17", "stock dcp.load of ckptmgr's files, to dcp.save's", 1.05, times, _stock)
    yield Check("T17", "tensors that come back changed", 0, "", _wrong_anywhere)
    yield Check("overlap", 'stall with capture="overlap"', 5, "ms", _plain("train", "stall_s", 1e3, "ckptmgr overlap"))
    for world in (2, 4):
        ours = "ckptmgr export"
        kind = "fsdp export"
        yield Check(
            "export", f"stall, {world} ranks, to the copy", 1.3, times, _ranks(kind, world, "stall_s", ours, "copy")
        )
        yield Check(
            "export", f"durable, {world} ranks, to gather + save_file + fsync", 0.7, times,
            _ranks(kind, world, "durable_s", ours, "gather + save_file"),
        )  # fmt: skip
        yield Check(
            "export", f"durable, {world} ranks, to DCP's writer, consolidated", 0.5, times,
            _ranks(kind, world, "durable_s", ours, "dcp hf writer"),
        )  # fmt: skip
    yield Check(
        "control", "a save of one small tensor, 4 ranks", 50, "ms", _plain("one tensor, 4 ranks", "durable_s", 1e3)
    )
    yield Check("control", "a save of one small tensor, 1 rank", 50, "ms", _worst_history("small_durable_s", 1e3))
    yield Check("control", "the same, growth with the history", 1.2, times, _flatness("small_durable_s"))


def _load(way: str, kind: str) -> Callable[[Figures], Measured]:
    def measured(figures: Figures) -> Measured:
        mine = figures.median("train", "ckptmgr", f"load_{way}_{kind}_s")
        floor = figures.median("train", _FLOOR, f"load_{kind}_s")
        return (mine / floor, _FLOOR) if mine and floor else None

    return measured


CHECKS: Sequence[Check] = tuple(_checks())
