"""What every test folder shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before torch is imported: ranks find each other over loopback, whatever the host's name resolves to.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell ignores interrupts for what it starts in the background, and every process that we start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CKPTMGR_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a run directory may be; not created yet."""
    return tmp_path / "run"
