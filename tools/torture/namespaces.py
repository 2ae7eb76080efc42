"""Two hosts on one machine: network namespaces of our own with a wire between them, which can be cut."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from types import TracebackType
from typing import Self

from torture.report import NotTried

#: The interface in either namespace, and the addresses, which exist nowhere else.
WIRE = "wire"
_ADDRESSES = ("10.77.0.1/30", "10.77.0.2/30")
_NEWNET = 0x40000000


def require() -> None:
    """
    What networks need.

    Raises:
        NotTried: Something is missing.
    """
    if os.geteuid() != 0:
        raise NotTried("needs root, or `unshare -Urn` around it, for network namespaces")
    for command, package in (("ip", "iproute2"), ("nft", "nftables"), ("unshare", "util-linux")):
        if shutil.which(command) is None:
            raise NotTried(f"needs {command} (Debian: {package})")
    tried = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True)
    if tried.returncode:
        raise NotTried("needs the right to make a network namespace (CAP_SYS_ADMIN)")


class Hosts:
    """Two network namespaces, each held by a process that ends with this one, and the wire between them."""

    def __enter__(self) -> Self:
        self._holders = [
            subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo here; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in _ADDRESSES
        ]
        for holder in self._holders:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"here\n"
        first, second = map(str, self.pids)
        _run("ip", "link", "add", WIRE, "netns", first, "type", "veth", "peer", "name", WIRE, "netns", second)
        for number, address in enumerate(_ADDRESSES):
            self._on(number, "ip", "address", "add", address, "dev", WIRE)
            for link in ("lo", WIRE):
                self._on(number, "ip", "link", "set", link, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self._holders:
            holder.kill()
            holder.communicate()

    @property
    def pids(self) -> tuple[int, ...]:
        """A process in each."""
        return tuple(holder.pid for holder in self._holders)

    def cut(self) -> None:
        """The link is down, and both ends can see it."""
        self._on(1, "ip", "link", "set", WIRE, "down")

    def blackhole(self) -> None:
        """Everything is lost on its way, and nobody can see it."""
        self._on(1, "nft", "add table inet hole")
        for hook, side in (("input", "iifname"), ("output", "oifname")):
            self._on(1, "nft", f"add chain inet hole {hook} {{ type filter hook {hook} priority 0; }}")
            self._on(1, "nft", f"add rule inet hole {hook} {side} {WIRE} drop")

    def mend(self) -> None:
        """Undo it."""
        self._on(1, "ip", "link", "set", WIRE, "up")
        self._on(1, "nft", "flush ruleset")

    def _on(self, number: int, *command: str) -> None:
        _run("nsenter", "--target", str(self.pids[number]), "--net", *command)


def enter_network(pid: int) -> None:
    """This process lives in the network namespace of *pid* from now on, and Gloo uses its wire."""
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = WIRE


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
