"""``ckptmgr metrics``: durability as numbers, for Prometheus; the one door for prometheus_client."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckptmgr import durability
from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, size
from ckptmgr.errors import MissingLibrary

DESCRIPTION = """\
Print how durable the run is, in the text format of Prometheus: commits,
failures, steps at risk, seconds since the last commit, stall, bytes. With -o
into a file, atomically, for the textfile collector of the node exporter.
Needs prometheus_client: pip install 'ckptmgr[metrics]'."""
EXAMPLES = """\
  ckptmgr metrics runs/alpha
  ckptmgr metrics runs/alpha -o /var/lib/node_exporter/alpha.prom
  ckptmgr metrics runs/alpha --json | jq '.samples[] | select(.value > 0)'"""

PREFIX = "ckptmgr_"
RUN_LIVE = "run_live"
RUN_LIVE_MEANING = "Whether a manager may be at work on the run."
#: How a file is recognised that may be overwritten.
MARK = f"# HELP {PREFIX}"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One number. ``series`` is None for one about the whole run."""

    name: str
    run: str
    series: str | None
    value: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--output", "-o", metavar="FILE", help="write them there instead of printing them")
    parser.add_argument("--force", action="store_true", help="overwrite FILE, even if it has no such numbers")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print or write the numbers."""
    from ckptmgr.cli import written

    rundir = target.locate(args)
    place = None
    if args.output is not None:
        place = written.place(args.output, rundir, mark=MARK, force=args.force)
    with target.reading(args) as (journal, rundir):
        records = journal.checkpoints()
        series = {
            name: durability.of_series([record for record in records if record.series == name], now=time.time())
            for name in journal.series()
        }
        live = target.live_epoch(journal) is not None
        about = target.document(rundir, journal.run_id)
    found = list(samples(rundir.path.name, series, live=live))
    if place is not None or not out.as_json:
        text = exposition(found)
    if place is not None:
        written.write(place, text)
    if out.as_json:
        document = {"run": about, "output": str(place) if place is not None else None}
        out.document(document | {"samples": [as_json(sample) for sample in found]})
    elif place is not None:
        out.line(f"{place}: {size(len(text))}")
    else:
        for line in text.decode().splitlines():
            out.line(line)
    return Exit.OK


def samples(run: str, series: Mapping[str, Mapping[str, float]], *, live: bool) -> Iterator[Sample]:
    """The numbers of one run: whether it is live, then what `durability.of_series` says of each series."""
    yield Sample(PREFIX + RUN_LIVE, run, None, float(live))
    for metric in durability.METRICS:
        for name, numbers in series.items():
            if metric.name in numbers:
                yield Sample(PREFIX + metric.name, run, name, float(numbers[metric.name]))


def as_json(sample: Sample) -> dict[str, Any]:
    """The sample object of the JSON contract."""
    return {"name": sample.name, "labels": {"run": sample.run, "series": sample.series}, "value": sample.value}


def exposition(found: Sequence[Sample]) -> bytes:
    """
    The text that Prometheus reads.

    Raises:
        MissingLibrary: prometheus_client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError as error:
        raise MissingLibrary(
            f"speaking to Prometheus needs prometheus_client, which cannot be imported: {error}",
            hint="pip install 'ckptmgr[metrics]'",
            library="prometheus_client",
            extra="metrics",
        ) from error

    def text_of(run: str) -> str:
        return os.fsencode(run).decode(errors="backslashreplace")

    class Collected:
        def collect(self) -> Iterable[Any]:
            live = GaugeMetricFamily(PREFIX + RUN_LIVE, RUN_LIVE_MEANING, labels=["run"])
            for one in found:
                if one.series is None:
                    live.add_metric([text_of(one.run)], one.value)
            yield live
            for metric in durability.METRICS:
                kind = CounterMetricFamily if metric.grows else GaugeMetricFamily
                family = kind(PREFIX + metric.name, metric.meaning, labels=["run", "series"])
                for one in found:
                    if one.series is not None and one.name == PREFIX + metric.name:
                        family.add_metric([text_of(one.run), one.series], one.value)
                yield family

    registry = CollectorRegistry()
    registry.register(Collected())
    text = generate_latest(registry)
    assert isinstance(text, bytes)
    return text
