#!/usr/bin/env python
"""
Take the pictures of ``ckptmgr report`` in the docs, from a run that really happened.

Four ranks train a small model and save it. A writer is killed in the middle of a save, the whole job is killed in the
middle of another one and started again, one rank writes slowly, and at the end a file of the newest checkpoint is
cut short. Needs chromium; takes about two minutes.

    tools/report_pictures.py                                # writes docs/images/report-*.png
    tools/report_pictures.py --into /tmp/pictures --all     # also phone, dark phone, whole pages and a PDF
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
EVERY = 100
FAILS, DIES, LAST = 500, 1200, 2400


def train(run: Path) -> None:
    """What each rank does; the process group is that of torchrun."""
    rank = int(os.environ["RANK"])
    # The docs are not about the machine that made them.
    socket.gethostname = lambda: f"node-{rank // 2}"
    import torch
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ckptmgr import DCP, CheckpointManager, KeepEvery, KeepLast, SaveFailed, Series, WriterOptions

    torch.manual_seed(0)
    init_process_group("gloo")
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12)))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    slow = 6 if rank == 3 else 12
    with CheckpointManager(
        run,
        series=[
            Series("checkpoint", DCP(), keep=KeepLast(3) | KeepEvery(1000)),
            Series("snapshot", DCP(), keep=KeepLast(1)),
        ],
        writers=WriterOptions(max_bytes_per_second=slow * 10**6),
    ) as manager:
        state = {"model": model, "optimizer": optimizer}
        resumed = manager.resume(state)
        for step in range(resumed.step + 1 if resumed else 1, LAST + 1):
            if step % 10 == 0:
                model(torch.randn(4, 512)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if step % EVERY:
                continue
            pending = manager.save(step, state)
            if step == FAILS and rank == 2:
                assert manager.writer_pid is not None
                threading.Timer(0.2, os.kill, (manager.writer_pid, signal.SIGKILL)).start()
            if step == DIES and not resumed:
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                pending.wait(60)
                manager.poll()
            except SaveFailed as error:
                print(f"rank {rank}: {error}", file=sys.stderr)
            if step % 600 == 0:
                manager.save(step, {"model": model}, series="snapshot").wait(60)
    destroy_process_group()


def make_run(run: Path) -> None:
    """Two starts of the job, the first of which dies, and damage at the end."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    for _ in range(2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        subprocess.run([*words, __file__, "--train", str(run)], env=environment, check=False, timeout=300)
    newest = max((run / "checkpoint").glob("step-*/*.distcp"), key=lambda path: path.stat().st_mtime)
    os.truncate(newest, newest.stat().st_size // 2)


def of_few_colours(path: Path) -> None:
    """Make a picture small: what stands in a repository stays in it."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)


def main() -> int:
    """Make the run, the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "images", help="where to write the pictures")
    parser.add_argument("--all", action="store_true", help="every width and light, whole pages, and on paper")
    parser.add_argument("--report", type=Path, help="take pictures of this page instead of making a run")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        train(args.train)
        return 0
    from browser import browser

    args.into.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.gettempdir()) / "training"
    page = args.report
    if page is None:
        shutil.rmtree(folder, ignore_errors=True)
        run = folder / "runs" / "alpha"
        make_run(run)
        page = folder / "report.html"
        words = [sys.executable, "-m", "ckptmgr", "report", str(run), "-o", str(page)]
        subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    url = page.resolve().as_uri()
    with browser() as opened:
        for name, dark in (("light", False), ("dark", True)):
            opened.load(url, dark=dark)
            figure = opened.value("document.querySelector('#phases-title + figure svg').getBoundingClientRect().bottom")
            opened.picture(args.into / f"report-{name}.png", height=int(figure) + 16)
            of_few_colours(args.into / f"report-{name}.png")
            if args.all:
                opened.picture(args.into / f"whole-{name}.png")
                opened.load(url, width=390, dark=dark)
                opened.picture(args.into / f"phone-{name}.png")
        if args.all:
            opened.load(url, width=794, medium="print")
            opened.picture(args.into / "paper.png")
            opened.paper(args.into / "paper.pdf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
