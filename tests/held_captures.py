"""A gate in front of every capture's copying, so that a test decides when the state is read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch

from ckptmgr.writers.arena import Arena


class Gate:
    """Captures that have begun, and whether they may read yet."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def open(self) -> None:
        """Let them read."""
        self._opened.set()

    def shut(self) -> None:
        """Hold those that begin from now on."""
        self.reached.clear()
        self._opened.clear()

    def pass_(self) -> None:
        """Wait as a capture."""
        self.reached.set()
        if not self._opened.wait(30):
            raise TimeoutError("the test never opened the gate")


@contextlib.contextmanager
def held_captures() -> Iterator[Gate]:
    """No capture reads a byte before the gate is opened, which leaving the block does."""
    gate = Gate()
    begin = Arena.begin

    def held(arena: Arena, sources: Mapping[object, torch.Tensor]) -> Callable[[], None]:
        copy = begin(arena, sources)

        def wait_and_copy() -> None:
            gate.pass_()
            copy()

        return wait_and_copy

    Arena.begin = held  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.open()
        Arena.begin = begin  # type: ignore[method-assign]
