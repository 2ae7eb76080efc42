"""
A capture that reads while the training goes on, and how it finds out that the state changed under it.

Whoever keeps the promise of ``updating()`` is never in doubt. For who does not, there are three
tripwires: the version counter of every tensor, the place of its memory, and a hook on every step of a
``torch.optim`` optimizer, because fused optimizers and those of DTensors leave the counters alone.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ckptmgr.errors import StateChanged

log = logging.getLogger("ckptmgr")

_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: Names of changed tensors that an error lists.
_NAMED = 3


class Reading:
    """
    One capture that reads in a thread of its own, from its start until it is known whether the state stayed.

    Args:
        copy: What copies; see `Arena.begin`.
        tensors: What it reads from, by name, and tensors that share a version counter with that.

    Raises:
        RuntimeError: A tensor has no version counter (one made in inference mode); nothing was begun.
    """

    def __init__(self, copy: Callable[[], None], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.seconds = 0.0
        self.error: Exception | None = None
        self._copy: Callable[[], None] | None = copy
        self._marks = [(name, tensor, _mark(tensor)) for name, tensor in tensors]
        self._changing = threading.Lock()
        self._is_concluded = False
        self._is_read = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckptmgr-capture", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the arena is still being written to."""
        return self._copy is not None and self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        """Wait at most *timeout_s* seconds until all is read; returns whether it is, or has failed."""
        return self._is_read.wait(timeout_s)

    def conclude(self) -> None:
        """
        Once all is read, and not before: look for changes. What changes from now on is of no concern.

        An operation raises a counter when it ends. Called by a thread that does updates this leaves none out;
        called by another one, only those that have not ended until now, so that one calls late.
        """
        with self._changing:
            if self._is_concluded or not self._is_read.is_set():
                return  # one that still reads goes on looking, for whoever else waits for it
            names = [name for name, tensor, mark in self._marks if _mark(tensor) != mark]
            if self.error is None and names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                self.error = _changed(f"{', '.join(names[:_NAMED])}{more} changed")
            self._is_concluded = True
            self._marks = []

    def finish(self, timeout_s: float) -> bool:
        """`wait` and `conclude`; returns whether it was read in time."""
        if not self.wait(timeout_s):
            return False
        self.conclude()
        if not self.is_running:
            self._thread.join(1.0)  # it has nothing left to do
        return True

    def abandon(self, error: Exception) -> None:
        """Let nobody wait for it any more; it has failed with *error* unless it is known how it ended."""
        with self._changing:
            if not self._is_concluded:
                self.error = self.error or error
                self._is_concluded = True
        self._is_read.set()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step, on this thread."""
        if self._is_read.is_set():
            self.conclude()
            return
        with self._changing:
            if not self._is_concluded and self.error is None and self._reads_of(optimizer):
                self.error = _changed(f"{type(optimizer).__name__}.step() was called")

    def _run(self) -> None:
        started = time.monotonic()
        try:
            assert self._copy is not None
            self._copy()
        except Exception as error:
            log.exception("a capture failed while it was reading")
            with self._changing:
                self.error = self.error or error
        self._copy = None
        self.seconds = time.monotonic() - started
        self._is_read.set()

    def _reads_of(self, optimizer: torch.optim.Optimizer) -> bool:
        places = {_storage(tensor) for _, tensor, _ in self._marks}
        parameters = (tensor for group in optimizer.param_groups for tensor in group["params"])
        states = (state.values() for state in optimizer.state.values() if isinstance(state, Mapping))
        tensors = itertools.chain(parameters, itertools.chain.from_iterable(states))
        return any(isinstance(one, torch.Tensor) and one.numel() and _storage(one) in places for one in tensors)


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells that a tensor was changed, or its memory taken away."""
    return tensor._version, (tensor if type(tensor) in _PLAIN else _local(tensor)).data_ptr()


def _storage(tensor: torch.Tensor) -> int:
    return _local(tensor).untyped_storage().data_ptr()


def _local(tensor: Any) -> torch.Tensor:
    """What a DTensor has on this rank, whose own memory it says nothing of."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def _changed(what: str) -> StateChanged:
    return StateChanged(f"{what} outside of updating() while it was read", what=what)
