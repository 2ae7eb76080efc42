"""How fast bytes may go, so that what is done beside a training run does not disturb it."""

from __future__ import annotations

import threading
import time


class Pace:
    """Lets bytes go no faster than *rate* per second, whichever thread moves them; 0: as fast as it goes."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._next = time.monotonic()
        self._lock = threading.Lock()

    def wait(self, count: int) -> None:
        """Until *count* bytes more may go."""
        if self._rate:
            with self._lock:
                self._next = max(self._next, time.monotonic()) + count / self._rate
                mine = self._next
            time.sleep(max(0.0, mine - time.monotonic()))
