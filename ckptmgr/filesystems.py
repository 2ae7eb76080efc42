"""
What each kind of file system promises: tables, and how to find a mount's row in them.

No trial on one host can show whether locks reach other hosts, or whether a server keeps what it
acknowledged. It is written here as the makers of each file system say it; nothing here was tried.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping


class Level(enum.StrEnum):
    """How bad something is. A place with an error is not for a run."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Kind(enum.StrEnum):
    """What is behind a file system."""

    LOCAL = "local"
    NETWORK = "network"
    USER_SPACE = "user space"
    OBJECT_STORE = "object store"
    MEMORY = "memory"
    LAYER = "layer"
    READ_ONLY = "read-only"
    PSEUDO = "pseudo"
    UNKNOWN = "unknown"


class Reach(enum.StrEnum):
    """How far a lock holds."""

    #: One host uses the file system, so there is nobody else.
    ALONE = "alone"
    #: All hosts, as the makers say.
    ALL = "all"
    #: The host that took it; another one gets it too.
    HOST = "host"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Mount:
    """
    One line of /proc/self/mountinfo.

    ``options`` are those of the mount and of the file system together; ``device`` is major:minor.
    """

    type: str
    source: str
    point: str
    options: tuple[str, ...] = ()
    device: str = ""


@dataclasses.dataclass(frozen=True)
class FileSystem:
    """What a file system promises; for what it does not, a level and what to do about it."""

    name: str
    kind: Kind
    level: Level
    text: str
    hint: str = ""
    reach: Reach = Reach.ALONE
    #: Who keeps the locks, or what decides how far they hold.
    locks: str = ""


@dataclasses.dataclass(frozen=True)
class Option:
    """A mount option that takes something away, on file systems of the *types*; on any, if there are none."""

    types: tuple[str, ...]
    pattern: str
    level: Level
    text: str
    hint: str
    #: How far locks hold with it, if it says anything about that.
    reach: Reach | None = None


# -- the rows ---------------------------------------------------------------------------------------

_SOLID = "a local file system: fsync and rename do what is relied on, if the disk keeps what it acknowledged"
_LATE = "other hosts may see late what one creates or writes, which can fail a save and never commits a wrong one"
_REACHES = f"fsync reaches the servers; {_LATE}"
_VALIDATE = "validate it on your hosts first, see docs/howto/validate-on-a-cluster.md"
_A_DISK = "use a disk with ext4 or XFS"


def _local(name: str) -> FileSystem:
    return FileSystem(name, Kind.LOCAL, Level.OK, _SOLID)


def _lesser(name: str, text: str, level: Level = Level.WARNING) -> FileSystem:
    return FileSystem(name, Kind.LOCAL, level, text, _A_DISK)


def _network(name: str, text: str, reach: Reach, locks: str, hint: str = _VALIDATE) -> FileSystem:
    return FileSystem(name, Kind.NETWORK, Level.WARNING, text, hint, reach, locks)


def _user_space(name: str, text: str, reach: Reach, locks: str, hint: str) -> FileSystem:
    return FileSystem(name, Kind.USER_SPACE, Level.WARNING, text, hint, reach, locks)


def _objects(name: str) -> FileSystem:
    return FileSystem(
        name, Kind.OBJECT_STORE, Level.ERROR,
        "an object store behind a mount: as a rule a directory is not renamed in one step, a file is not changed in "
        "place, and fsync does not mean what it says",
        "save to a file system, and copy committed checkpoints from an on_commit hook",
        Reach.HOST, "an object store keeps none",
    )  # fmt: skip


def _memory(name: str) -> FileSystem:
    return FileSystem(
        name, Kind.MEMORY, Level.ERROR,
        "memory: everything is gone after a restart or a power cut, and fsync does nothing",
        "put the run on a disk; here only what may be lost together with this host",
    )  # fmt: skip


def _layer(name: str) -> FileSystem:
    return FileSystem(
        name, Kind.LAYER, Level.WARNING,
        "layers over each other, as a rule those of a container: everything goes when the container is removed",
        "put the run on a volume that is mounted into the container",
    )  # fmt: skip


def _outside(name: str) -> FileSystem:
    return _network(
        name,
        "a folder of the machine outside this one: its cache settings decide what fsync does",
        Reach.UNKNOWN,
        "the machine outside decides, and as a rule they hold in this guest only",
        "use a disk of the virtual machine, or mount the storage in it directly",
    )


def _pseudo(name: str) -> FileSystem:
    hint = "choose a directory on a disk"
    return FileSystem(name, Kind.PSEUDO, Level.ERROR, "made by the kernel, and not to hold files", hint)


def _image(name: str) -> FileSystem:
    return FileSystem(
        name, Kind.READ_ONLY, Level.ERROR, "read-only by design", "choose a directory that can be written"
    )


_UNKNOWN = FileSystem(
    "unknown", Kind.UNKNOWN, Level.WARNING,
    "a file system that this version of ckptmgr does not know, so only what was tried here is known",
    "find out what it promises about fsync, rename and locks", Reach.UNKNOWN, "it is not known who keeps them",
)  # fmt: skip
_FUSE = _user_space(
    "FUSE", "a program in user space, which decides what fsync and rename do", Reach.UNKNOWN,
    "the program behind the mount decides", "find out what is behind it; " + _VALIDATE,
)  # fmt: skip
_FOREIGN = "made for another system: names, permissions and links are translated"

#: Types as Linux names them → what is known. Those of FUSE have the name of the program after a dot.
_ROWS: tuple[tuple[str, FileSystem], ...] = (
    *((name, _local(name)) for name in ("ext3", "ext4", "btrfs", "bcachefs", "jfs", "reiserfs", "nilfs2")),
    ("xfs", _local("XFS")),
    ("f2fs", _local("F2FS")),
    ("zfs", dataclasses.replace(
        _local("ZFS"), text=f"{_SOLID}; a dataset with `sync=disabled` has no fsync, which cannot be seen from here")),
    ("ext2", _lesser("ext2", "without a journal: after a power cut a rename may be half done until fsck has run")),
    ("vfat msdos exfat fuse.exfat", _lesser(
        "FAT", "without a journal, links and permissions: after a power cut a rename may be half done", Level.ERROR)),
    ("ntfs ntfs3 fuse.ntfs-3g", _lesser("NTFS", _FOREIGN)),
    ("hfs hfsplus apfs fuse.apfs", _lesser("a file system of macOS", _FOREIGN)),
    ("fuseblk", _user_space("a disk behind FUSE", f"as a rule NTFS or exFAT, {_FOREIGN}", Reach.ALONE, "", _A_DISK)),
    *((name, _memory(name)) for name in ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")),
    ("overlay", _layer("overlayfs")),
    ("fuse.fuse-overlayfs", _layer("fuse-overlayfs")),
    *((name, _layer(name)) for name in ("aufs", "unionfs", "fuse.unionfs")),
    ("nfs nfs4", _network(
        "NFS",
        "a network file system: the server keeps what it acknowledged if it exports with `sync`, which cannot be seen "
        f"from here; {_LATE}",
        Reach.ALL, "the server keeps them, and may lose one in a network failure or when it restarts",
        "see that the server exports with `sync`; " + _VALIDATE)),
    ("lustre", _network(
        "Lustre", f"a cluster file system: {_REACHES}", Reach.UNKNOWN,
        "on all hosts with the mount option `flock`, on one host with `localflock`, and this mount names neither",
        "mount with `flock` on every host; " + _VALIDATE)),
    ("gpfs mmfs", _network(
        "GPFS", f"a cluster file system (Storage Scale): {_REACHES}", Reach.UNKNOWN,
        "its makers say so of fcntl locks (SQLite's), and we could not verify it of flock (the run lock)")),
    ("beegfs beegfs_nodev fhgfs", _network(
        "BeeGFS", f"a cluster file system: {_REACHES}", Reach.UNKNOWN,
        "only with `tuneUseGlobalFileLocks = true` in beegfs-client.conf, which is not the default",
        "set `tuneUseGlobalFileLocks = true` and `tuneRemoteFSync = true` on every host; " + _VALIDATE)),
    ("ceph fuse.ceph fuse.ceph-fuse", _network(
        "CephFS", "a cluster file system: fsync reaches the servers, and clients learn of changes before they read",
        Reach.ALL, "the metadata servers keep them")),
    ("fuse.glusterfs", _network(
        "GlusterFS", f"a cluster file system: {_REACHES}", Reach.ALL, "the servers keep them")),
    ("cifs smb3 smb2 smbfs", _network(
        "SMB", f"a network file system {_FOREIGN}; {_LATE}", Reach.ALL, "the server keeps them",
        "prefer NFS or a cluster file system; " + _VALIDATE)),
    ("ocfs2", _network("OCFS2", "a cluster file system on shared disks", Reach.ALL, "its lock manager keeps them")),
    ("gfs2", _network("GFS2", "a cluster file system on shared disks", Reach.ALL, "its lock manager keeps them")),
    ("afs", _network(
        "AFS", f"a network file system that stores a file when it is closed; {_LATE}", Reach.UNKNOWN,
        "SQLite's hold on one host, unless it is mounted with `flock=strict` or `flock=write`")),
    ("orangefs pvfs2", _network(
        "OrangeFS", f"a cluster file system; {_LATE}", Reach.HOST, "OrangeFS keeps none between hosts")),
    ("wekafs", _network("WekaFS", f"a cluster file system: {_REACHES}", Reach.UNKNOWN, "we could not verify it")),
    ("panfs", _network("PanFS", f"a cluster file system: {_REACHES}", Reach.UNKNOWN, "we could not verify it")),
    ("fuse.quobyte", _network("Quobyte", f"a cluster file system; {_LATE}", Reach.UNKNOWN, "we could not verify it")),
    ("fuse.daos", _network("DAOS", f"a cluster file system; {_LATE}", Reach.UNKNOWN, "we could not verify it")),
    ("fuse.dfuse", _network("DAOS", f"a cluster file system; {_LATE}", Reach.UNKNOWN, "we could not verify it")),
    ("fuse.mfs fuse.moosefs", _network(
        "MooseFS", f"a cluster file system; {_LATE}", Reach.UNKNOWN, "we could not verify it")),
    ("fuse.juicefs", _network(
        "JuiceFS", f"over an object store and a database: fsync uploads, unless mounted with `--writeback`; {_LATE}",
        Reach.ALL, "its metadata engine keeps them", "mount without `--writeback`; " + _VALIDATE)),
    ("fuse.sshfs", _network(
        "sshfs", f"another host's file system over SFTP, whose server decides what fsync and rename do; {_LATE}",
        Reach.HOST, "sshfs keeps them where it is mounted", "save on the other host itself, or mount it by NFS")),
    *((name, _outside(name.removeprefix("fuse."))) for name in (
        "9p", "virtiofs", "vboxsf", "fuse.vmhgfs-fuse", "prl_fs", "drvfs")),
    *((f"fuse.{name}", _objects(name)) for name in (
        "s3fs", "mountpoint-s3", "mount-s3", "goofys", "gcsfuse", "blobfuse", "blobfuse2", "rclone", "ossfs", "cosfs",
        "obsfs", "geesefs", "tigrisfs", "s3ql", "gdfuse", "davfs")),
    ("davfs", _objects("davfs")),
    ("fuse", _FUSE),
    *((name, _pseudo(name)) for name in (
        "proc", "sysfs", "cgroup", "cgroup2", "devpts", "debugfs", "tracefs", "securityfs", "bpf", "pstore", "mqueue",
        "configfs", "binfmt_misc", "autofs", "efivarfs", "fusectl", "nsfs", "selinuxfs", "rpc_pipefs", "nfsd")),
    *((name, _image(name)) for name in (
        "squashfs", "erofs", "iso9660", "cramfs", "romfs", "fuse.squashfuse", "cvmfs", "fuse.cvmfs2")),
)  # fmt: skip
FILE_SYSTEMS: Mapping[str, FileSystem] = {name: row for names, row in _ROWS for name in names.split()}

#: ``f_type`` of statfs(2) → type, for when /proc says nothing.
MAGIC: Mapping[int, str] = {
    0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x2FC12FC1: "zfs", 0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs", 0x3153464A: "jfs", 0x52654973: "reiserfs", 0x3434: "nilfs2",
    0x4D44: "vfat", 0x2011BAB0: "exfat", 0x5346544E: "ntfs", 0x7366746E: "ntfs3", 0x482B: "hfsplus",
    0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs", 0x794C7630: "overlay", 0x61756673: "aufs",
    0x6969: "nfs", 0x0BD00BD0: "lustre", 0x47504653: "gpfs", 0x19830326: "beegfs", 0x00C36400: "ceph",
    0xFF534D42: "cifs", 0xFE534D42: "smb3", 0x517B: "smbfs", 0x7461636F: "ocfs2", 0x01161970: "gfs2",
    0x5346414F: "afs", 0x6B414653: "afs", 0x20030528: "orangefs", 0xAAD7AAEA: "panfs",
    0x01021997: "9p", 0x786F4256: "vboxsf", 0x7C7C6673: "prl_fs", 0x65735546: "fuse",
    0x9FA0: "proc", 0x62656572: "sysfs", 0x27E0EB: "cgroup", 0x63677270: "cgroup2", 0x1CD1: "devpts",
    0x64626720: "debugfs", 0x74726163: "tracefs", 0x0187: "autofs",
    0x73717368: "squashfs", 0xE0F5E1E2: "erofs", 0x9660: "iso9660", 0x28CD3D45: "cramfs",
}  # fmt: skip

_ON_EXT = ("ext2", "ext3", "ext4")
_ON_NFS = ("nfs", "nfs4")
_ON_SMB = ("cifs", "smb3", "smb2", "smbfs")
_ONE_HOST = "locks hold on this host only"

#: In the order in which they are reported.
OPTIONS: tuple[Option, ...] = (
    Option((), "ro", Level.ERROR, "nothing can be written", "mount it for writing, or choose another directory"),
    Option((), "nobarrier|barrier=(?:0|none)|fsync_mode=nobarrier", Level.WARNING,
           "fsync does not reach the medium, and a power cut takes what is in the disk's volatile cache",
           "mount without it, unless the cache of the disk has a battery"),
    Option(("overlay",), "volatile|fsync=volatile", Level.ERROR,
           "fsync does nothing, and a power cut may take committed checkpoints", "mount without it, or use a volume"),
    Option(_ON_EXT, "data=writeback", Level.INFO,
           "files that nobody synced may hold old data after a power cut; ckptmgr syncs all that counts", ""),
    Option(_ON_NFS, "nolock", Level.WARNING, _ONE_HOST, "mount with `lock` (the default)", Reach.HOST),
    Option(_ON_NFS, "local_lock=(?:all|flock|posix)", Level.WARNING, _ONE_HOST,
           "mount with `local_lock=none` (the default)", Reach.HOST),
    Option(_ON_NFS, "soft|softerr", Level.WARNING,
           "calls fail that a `hard` mount waits for until the server answers: saves fail, data may be lost silently",
           "mount with `hard` (the default)"),
    Option(_ON_NFS, "nocto", Level.WARNING,
           "opening a file does not ask the server for its newest state: ranks see old data, and saves fail",
           "mount with `cto` (the default)"),
    Option(("lustre",), "localflock", Level.WARNING, _ONE_HOST, "mount with `flock` on every host", Reach.HOST),
    Option(("lustre",), "noflock", Level.WARNING, "there are no locks, and a manager refuses to start",
           "mount with `flock` on every host, or put the journal elsewhere", Reach.HOST),
    Option(_ON_SMB, "nobrl", Level.WARNING, _ONE_HOST, "mount with `brl` (the default)", Reach.HOST),
    Option(_ON_SMB, "nostrictsync", Level.WARNING, "fsync does not ask the server to write to its disk",
           "mount without it"),
    Option(_ON_SMB, "cache=loose", Level.WARNING, "other hosts see late what is written here",
           "mount with `cache=strict`"),
    Option(("gfs2", "ocfs2"), "localflocks", Level.WARNING, _ONE_HOST, "mount without it", Reach.HOST),
    Option(("9p",), "cache=(?:loose|fscache|mmap)", Level.WARNING, "data that others may change is kept here",
           "mount with `cache=none`"),
)  # fmt: skip
#: Options that take nothing away, and say how far locks hold.
_LOCKS_REACH: Mapping[tuple[str, str], Reach] = {("lustre", "flock"): Reach.ALL}


# -- finding them -----------------------------------------------------------------------------------


def parse_mountinfo(text: str) -> dict[int, Mount]:
    """The mounts in the text of /proc/self/mountinfo, by their number. What is no such line is left out."""
    mounts = {}
    for line in text.split("\n"):  # a name may hold what else ends a line
        before, dash, after = line.partition(" - ")
        head, tail = before.split(" "), after.split(" ")
        if not dash or len(head) < 6 or not head[0].isdecimal() or len(tail) < 2:
            continue
        options = dict.fromkeys([*head[5].split(","), *(tail[-1].split(",") if len(tail) > 2 else ())])
        if "ro" in options:  # of the mount or of the file system: either is enough
            options.pop("rw", None)
        mounts[int(head[0])] = Mount(
            type=_unescaped(tail[0]),
            source=_unescaped(tail[1]),
            point=_unescaped(head[4]),
            options=tuple(map(_unescaped, options)),
            device=head[2],
        )
    return mounts


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def mount_over(mounts: Iterable[Mount], path: str) -> Mount | None:
    """The one of *mounts*, later ones on top, that an absolute *path* lies on, told from its words alone."""
    found = None
    for mount in mounts:
        point = mount.point.rstrip("/")
        if (path + "/").startswith(point + "/") and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def file_system(mount: Mount) -> FileSystem:
    """What is known of the file system of *mount*."""
    kind, _, program = mount.type.partition(".")
    if mount.type == "fuse":
        # A program that gives the mount no type of its own often names itself as the source.
        program = re.split(r"[:#@ ]", mount.source, maxsplit=1)[0].lower()
    known = FILE_SYSTEMS.get(f"{kind}.{program}" if program else kind) or FILE_SYSTEMS.get(kind)
    if known is None:
        return dataclasses.replace(_UNKNOWN, name=mount.type)
    if known is _FUSE:
        name = mount.type.partition(".")[2] or (mount.source if not mount.source.startswith("/") else "")
        return dataclasses.replace(known, name=f"FUSE ({name})" if name else "FUSE")
    return known


def options_that_matter(mount: Mount) -> list[tuple[str, Option]]:
    """The options of *mount* that take something away, each as it is spelled there."""
    return [
        (text, option)
        for option in OPTIONS
        if not option.types or mount.type in option.types
        for text in mount.options
        if re.fullmatch(option.pattern, text)
    ]


def reach_of_locks(mount: Mount) -> tuple[Reach, str]:
    """How far locks hold on *mount*, and why."""
    said = {text: option.reach for text, option in options_that_matter(mount) if option.reach is not None}
    said |= {text: _LOCKS_REACH[mount.type, text] for text in mount.options if (mount.type, text) in _LOCKS_REACH}
    for text, reach in said.items():
        return reach, f"it is mounted with `{text}`"
    known = file_system(mount)
    return known.reach, known.locks
