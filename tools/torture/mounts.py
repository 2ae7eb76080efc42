"""
File systems of our own: images behind loop devices and small tmpfs.

Children of the fork server call what stands here. They share a mount namespace that nobody else sees,
so nothing of it is left when the server is gone, however it went.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from torture.report import NotTried

_PRIVATE = ("unshare", "--mount", "--propagation", "private")
_PACKAGES = {
    "bindfs": "bindfs",
    "btrfs": "btrfs-progs",
    "fusermount3": "fuse3",
    "ip": "iproute2",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mount": "mount",
    "nft": "nftables",
    "unshare": "util-linux",
}
_MNT_DETACH = 2
_BALLAST = "ballast"
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW
_MKFS: dict[str, tuple[str, ...]] = {
    "ext4": ("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-N", "256", "-E", "lazy_itable_init=0,nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "--unsupported", "-l", "size=8m"),  # less than 300 MB is not for production
    "btrfs": ("mkfs.btrfs", "-q", "--mixed"),
}
#: Small enough to be copied for every point, large enough for its own log, bytes.
_SIZES = {"ext4": 24 << 20, "xfs": 32 << 20, "btrfs": 64 << 20}


def private() -> tuple[str, ...]:
    """What turns the command behind it into one whose mounts are its own; nothing where that cannot be done."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return ()
    tried = subprocess.run([*_PRIVATE, "true"], check=False, capture_output=True)
    return _PRIVATE if tried.returncode == 0 else ()


def require(*commands: str) -> None:
    """
    Everything here needs root, and these commands.

    Raises:
        NotTried: Something is missing; says what, and which Debian package has it.
    """
    if os.geteuid() != 0:
        raise NotTried("needs root, to mount file systems of its own")
    for command in ("mount", "unshare", *commands):
        if shutil.which(command) is None:
            raise NotTried(f"needs {command} (Debian: {_PACKAGES[command]})")
    if not private():
        raise NotTried("needs the right to make a mount namespace (CAP_SYS_ADMIN)")


def make(kind: str, image: Path, source: Path, names: str) -> None:
    """
    Make an *image* of a file system, with everything in *source* that has such *names*, all of it durable.

    Args:
        kind: ``ext4``, ``xfs``, ``btrfs``; of ``tmpfs`` the image is a folder.
        image: What to make.
        source: A folder.
        names: A pattern.
    """
    if kind == "tmpfs":
        copy(source, image, names)
        return
    with image.open("wb") as stream:
        stream.truncate(_SIZES[kind])
    _run(*_MKFS[kind], str(image))
    place = image.with_name(f"{image.name}.made")
    attach(kind, image, place)
    copy(source, place, names)
    detach(place)
    place.rmdir()


def copy(source: Path, place: Path, names: str = "*") -> None:
    """Everything in *source* that has such *names*, to *place*, which is made if it is missing."""
    place.mkdir(parents=True, exist_ok=True)
    for path in source.glob(names):
        if path.is_dir():
            shutil.copytree(path, place / path.name, symlinks=True)
        else:
            shutil.copy2(path, place / path.name)


def start(kind: str, image: Path, store: Path, narrow: bool = False) -> None:
    """
    Mount a copy of *image* at ``disk`` in *store*; what backs it is ``image`` there.

    *narrow*: the store is a tmpfs of its own, for `leave_below`.
    """
    store.mkdir()
    if narrow:
        tmpfs(store)
    if kind == "tmpfs":
        tmpfs(store / "disk", "size=8m", "nr_inodes=256")
        copy(image, store / "disk")
    else:
        _run("cp", "--sparse=always", str(image), str(store / "image"))
        attach(kind, store / "image", store / "disk")


def attach(kind: str, image: Path, place: Path) -> None:
    """Mount *image*; a log that its last use left is replayed."""
    place.mkdir(parents=True, exist_ok=True)
    # XFS refuses two that are copies of one unless told that this is meant.
    options = "loop,nouuid" if kind == "xfs" else "loop"
    _run("mount", "-n", "-t", kind, "-o", options, str(image), str(place))


def tmpfs(place: Path, *options: str) -> None:
    """Mount a tmpfs, unless there is one."""
    place.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(place):
        _run("mount", "-n", "-t", "tmpfs", *(("-o", ",".join(options)) if options else ()), "tmpfs", str(place))


@contextlib.contextmanager
def bound(folder: Path, place: Path, environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[Path]:
    """
    *folder* shown at *place* as well, by bindfs: what is written is seen at once, locks are known to this mount only.

    bindfs is a process of this process group, so that it ends with it. It gets *environment* besides.
    """
    place.mkdir()
    # Without direct_io each mount goes on reading its own old pages of a file that is open: no database survives that.
    options = "direct_io,attr_timeout=0,entry_timeout=0,negative_timeout=0"
    command = ["bindfs", "-f", "-o", options, str(folder), str(place)]
    with subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL) as daemon:
        try:
            deadline = time.monotonic() + 20
            while not os.path.ismount(place):
                assert daemon.poll() is None, f"bindfs ended with {daemon.returncode}"
                assert time.monotonic() < deadline, f"nothing was mounted at {place}"
                time.sleep(0.005)
            yield place
        finally:
            with contextlib.suppress(OSError):
                detach(place, at_once=True)
            daemon.kill()


def detach(place: Path, *, at_once: bool = False, within_s: float = 20) -> None:
    """
    Unmount; who was killed may take a moment to let go of its files.

    *at_once*: out of sight now, and gone with the last file that somebody, perhaps this process, has open.
    """
    deadline = time.monotonic() + within_s
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.umount2(os.fsencode(place), _MNT_DETACH if at_once else 0) != 0:
        code = ctypes.get_errno()
        if code != errno.EBUSY or time.monotonic() > deadline:
            raise OSError(code, os.strerror(code), str(place))
        time.sleep(0.005)


def replay(kind: str, store: Path) -> None:
    """Unmount and mount again, where that is possible without losing everything."""
    if kind != "tmpfs":
        detach(store / "disk")
        attach(kind, store / "image", store / "disk")


def discard(store: Path) -> None:
    """Unmount, and nothing of it is left when this process has ended."""
    detach(store / "disk", at_once=True)
    shutil.rmtree(store / "disk")
    (store / "image").unlink(missing_ok=True)
    if os.path.ismount(store):
        detach(store, at_once=True)
    store.rmdir()


# --- little space ------------------------------------------------------------------------------


def leave_bytes(place: Path, left: int) -> None:
    """Fill the file system at *place* until *left* bytes are free."""
    ballast = place / _BALLAST
    ballast.mkdir()
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    # ext4 keeps some blocks back for its own growth.
    reserve = Path("/sys/fs/ext4", Path(f"/sys/dev/block/{number}").resolve().name, "reserved_clusters")
    if reserve.exists():
        reserve.write_text("0")
    most = 1 << 20
    with (ballast / "bytes").open("wb") as stream:
        # The file's own block map needs space too, and how much is only known afterwards.
        while (more := free_bytes(place) - left) > 0:
            try:
                os.posix_fallocate(stream.fileno(), stream.seek(0, os.SEEK_END), min(more, most))
            except OSError:
                most //= 2
                if most < 4096:
                    break
    assert free_bytes(place) <= left, f"{free_bytes(place)} bytes are free at {place}, not {left}"


def free_bytes(place: Path) -> int:
    """What root may still use."""
    found = os.statvfs(place)
    return found.f_bfree * found.f_frsize


def leave_inodes(place: Path, left: int) -> None:
    """Fill the file system at *place* until *left* more files, links and directories can be made."""
    ballast = place / _BALLAST
    ballast.mkdir()
    for number in range(os.statvfs(place).f_ffree - left):
        (ballast / str(number)).touch()
    assert os.statvfs(place).f_ffree == left


def remove_ballast(place: Path) -> None:
    """Free what `leave_bytes` and `leave_inodes` have taken."""
    shutil.rmtree(place / _BALLAST, ignore_errors=True)


def leave_quota(place: Path, left: int) -> None:
    """Let the subvolume at *place* grow by *left* bytes, and no more."""
    _run("btrfs", "quota", "enable", str(place))
    _run("btrfs", "quota", "rescan", "-w", str(place))
    shown = subprocess.run(["btrfs", "qgroup", "show", "--raw", str(place)], check=True, capture_output=True, text=True)
    used = next(int(line.split()[1]) for line in shown.stdout.splitlines() if line.startswith("0/5 "))
    _run("btrfs", "qgroup", "limit", str(used + left), str(place))


def lift_quota(place: Path) -> None:
    """Let it grow again. Not by another limit: where nothing is left there is no room to write that down."""
    _run("btrfs", "quota", "disable", str(place))


def leave_below(place: Path, left: int) -> None:
    """Let the image behind *place*, in its narrow store, grow by *left* bytes; the file system in it does not know."""
    found = os.statvfs(place.parent)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    _run("mount", "-n", "-o", f"remount,size={used + left}", str(place.parent))


def relieve_below(place: Path) -> None:
    """Let it grow again."""
    _run("mount", "-n", "-o", "remount,size=1g", str(place.parent))


# --- worse -------------------------------------------------------------------------------------


def cut(place: Path) -> None:
    """The file system loses its power; its own log is not written either."""
    _control(place, _SHUTDOWN, _NO_LOG_FLUSH)


def freeze(place: Path) -> None:
    """From now on whoever changes something sleeps, and cannot be killed, until `thaw`."""
    _control(place, _FREEZE, 0)


def thaw(place: Path) -> None:
    """Let everyone go on."""
    _control(place, _THAW, 0)


def _control(place: Path, number: int, value: int) -> None:
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, number, value.to_bytes(4, "little"))
    finally:
        os.close(descriptor)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
