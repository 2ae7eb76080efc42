"""``ckptmgr report``: the run as one HTML page, for eyes."""

from __future__ import annotations

import argparse

from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, size

DESCRIPTION = """\
Write one HTML page about the run: what is safe to resume from and why not the
newest, then when and how long each save took, what stalled, who failed, and
what is on disk. It needs no network and no script, and can be mailed or
printed. Needs matplotlib: pip install 'ckptmgr[report]'."""
EXAMPLES = """\
  ckptmgr report runs/alpha -o report.html
  ckptmgr report runs/alpha -o /shared/alpha.html --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--output", "-o", metavar="FILE", default="report.html", help="where to write it (report.html)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE, even if it is no report")


def run(args: argparse.Namespace, out: Output) -> int:
    """Write the page."""
    from ckptmgr.cli import written
    from ckptmgr.cli.report import facts, page

    place = written.place(args.output, target.locate(args), mark=page.MARK, force=args.force)
    found = facts.gather(args, out)
    text = page.of_run(found).encode("utf-8", errors="backslashreplace")
    written.write(place, text)
    first = found.series[0] if found.series else None
    if out.as_json:
        out.document(
            {
                "run": {"run_id": found.run_id, "directory": found.directory, "journal": found.journal},
                "output": str(place),
                "bytes": len(text),
                "series": first.name if first is not None else None,
                "verdict": first.verdict.value if first is not None and first.verdict is not None else None,
                "path": first.path if first is not None else None,
            }
        )
    else:
        out.line(f"{place}: {size(len(text))}")
    return Exit.OK
