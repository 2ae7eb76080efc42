"""What `save` and `resume` answer."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ckptmgr.commit import AFTER_COMMIT, Job
from ckptmgr.errors import WaitTimeout
from ckptmgr.lifecycle import CheckpointState
from ckptmgr.resume import Finding


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The checkpoint that ``resume`` loaded."""

    series: str
    step: int
    path: Path
    world_size: int
    metrics: Mapping[str, float]
    checkpoint_id: int
    #: Why newer checkpoints were passed over: what speaks against each, newest first. Empty if this is the newest.
    passed_over: tuple[Finding, ...] = ()


class PendingSave:
    """A save on its way. It goes on in the background whether or not anyone waits."""

    def __init__(self, job: Job, patience_s: float) -> None:
        self._job = job
        self._patience_s = patience_s

    @property
    def step(self) -> int:
        """The step that is being saved."""
        return self._job.step

    @property
    def series(self) -> str:
        """The series it is saved in."""
        return self._job.series

    @property
    def state(self) -> CheckpointState | None:
        """COMMITTED or FAILED once that is known on this rank, None before. The journal has every state."""
        return self._job.state

    def done(self) -> bool:
        """Whether it is COMMITTED or FAILED; never blocks."""
        return self._job.settled.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """
        Wait until it is COMMITTED; on rank 0 also for its hooks and the deletions it caused.

        All ranks should call, or none: a failure raised here is not raised again by ``poll``.

        Args:
            timeout: In seconds; by default as long as a save may take by its own timeouts.

        Raises:
            SaveFailed: It failed; the same on every rank.
            WaitTimeout: It is still on its way.
        """
        deadline = time.monotonic() + (self._patience_s if timeout is None else timeout)
        if not self._job.settled.wait(max(0.0, deadline - time.monotonic())):
            waited = self._patience_s if timeout is None else timeout
            raise WaitTimeout(
                f"{self.series} step {self.step} is not committed after {waited:g} s",
                hint="it is still on its way; wait again, or see `ckptmgr log RUN`",
                what=f"{self.series} step {self.step}",
                timeout_s=waited,
            )
        if self._job.failure is not None:
            self._job.failure_seen = True
            # A copy: a traceback in the job would keep alive whatever the caller's frames hold.
            raise copy.copy(self._job.failure)
        if threading.current_thread().name != AFTER_COMMIT:  # a hook would wait for itself
            self._job.finished.wait(max(0.0, deadline - time.monotonic()))

    def __repr__(self) -> str:
        return f"<PendingSave {self.series} step {self.step}: {self.state or 'in flight'}>"
