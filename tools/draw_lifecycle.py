#!/usr/bin/env python3
"""
Draw the state diagram of docs/reference/states.md from the transition table in ckptmgr/lifecycle.py.

    tools/draw_lifecycle.py            rewrite the diagram in the page
    tools/draw_lifecycle.py --check    change nothing; end with 1 if the page's diagram is another one
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ckptmgr.lifecycle import TRANSITIONS, CheckpointState

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "states.md"
_DIAGRAM = re.compile(r"```mermaid\n.*?```\n", re.DOTALL)


def draw() -> str:
    """The state machine as a fenced Mermaid diagram, one arrow per source and trigger."""
    arrows = [
        (source, row["dest"], row["trigger"])
        for row in TRANSITIONS
        for source in (row["source"] if isinstance(row["source"], list) else [row["source"]])
    ]
    entered = {dest for _, dest, _ in arrows}
    left = {source for source, _, _ in arrows}
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {state}" for state in CheckpointState if state not in entered]
    lines += [f"    {source} --> {dest}: {trigger}" for source, dest, trigger in arrows]
    lines += [f"    {state} --> [*]" for state in CheckpointState if state not in left]
    return "\n".join([*lines, "```", ""])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that holds the diagram")
    options = parser.parse_args(arguments)
    before = options.page.read_text(encoding="utf-8")
    after, count = _DIAGRAM.subn(lambda _: draw(), before)
    if count != 1:
        raise SystemExit(f"{options.page} holds {count} Mermaid diagrams; it must hold one")
    if after == before:
        return 0
    if options.check:
        print(f"{options.page} shows another state machine than ckptmgr/lifecycle.py; run tools/draw_lifecycle.py")
        return 1
    options.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
