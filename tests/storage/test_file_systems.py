"""The tables of file systems, asked with lines as Linux prints them on machines that cannot be had here."""

from __future__ import annotations

import re

import pytest

from ckptmgr.filesystems import (
    FILE_SYSTEMS,
    MAGIC,
    OPTIONS,
    Kind,
    Level,
    Mount,
    Reach,
    file_system,
    mount_over,
    options_that_matter,
    parse_mountinfo,
    reach_of_locks,
)

NFS4 = (
    "612 29 0:52 / /mnt/nfs rw,relatime shared:318 - nfs4 10.0.0.5:/export/runs rw,vers=4.2,rsize=1048576,"
    "wsize=1048576,namlen=255,hard,proto=tcp,timeo=600,sec=sys,clientaddr=10.0.0.9,local_lock=none,addr=10.0.0.5"
)
NFS3_SOFT_NOLOCK = (
    "71 29 0:44 / /home rw,nosuid master:3 - nfs filer:/vol/home rw,vers=3,rsize=65536,wsize=65536,namlen=255,soft,"
    "nolock,proto=tcp,timeo=600,retrans=2,sec=sys,mountaddr=10.0.0.6,mountvers=3,mountport=635,mountproto=udp,"
    "local_lock=all,addr=10.0.0.6"
)
LUSTRE = "88 29 0:61 / /lustre rw,noatime - lustre 10.1.0.1@o2ib:10.1.0.2@o2ib:/scratch rw,{}user_xattr,lazystatfs"
GPFS = "91 29 0:47 / /gpfs/fs1 rw,relatime - gpfs fs1 rw"
BEEGFS = "92 29 0:48 / /mnt/beegfs rw,relatime - beegfs beegfs_nodev rw,cfgFile=/etc/beegfs/beegfs-client.conf"
CEPH = "93 29 0:49 / /ceph rw,relatime - ceph 10.2.0.1:6789,10.2.0.2:6789:/ rw,name=admin,secret=<hidden>,acl"
CEPH_FUSE = "94 29 0:50 / /ceph rw,nosuid,nodev,relatime - fuse.ceph-fuse ceph-fuse rw,user_id=0,group_id=0,allow_other"
CIFS = (
    "95 29 0:51 / /mnt/smb rw,relatime - cifs //nas/runs rw,vers=3.1.1,cache=strict,username=me,uid=1000,forceuid,"
    "gid=1000,forcegid,addr=10.0.0.7,file_mode=0755,dir_mode=0755,soft,nounix,serverino,mapposix,{}rsize=4194304"
)
S3FS = "96 29 0:53 / /mnt/s3 rw,nosuid,nodev,relatime - fuse.s3fs s3fs rw,user_id=0,group_id=0,allow_other"
GCSFUSE = "97 29 0:54 / /mnt/gcs rw,nosuid,nodev,relatime - fuse.gcsfuse my-bucket rw,user_id=0,group_id=0"
MOUNT_S3 = (
    "98 29 0:55 / /mnt/s3 rw,nosuid,nodev,noatime - fuse mountpoint-s3 rw,user_id=0,group_id=0,default_permissions"
)
RCLONE = "99 29 0:56 / /mnt/r rw,nosuid,nodev,relatime - fuse.rclone remote:bucket rw,user_id=1000,group_id=1000"
JUICEFS = "100 29 0:57 / /jfs rw,relatime - fuse.juicefs JuiceFS:vol1 rw,user_id=0,group_id=0,default_permissions"
SSHFS = "101 29 0:58 / /mnt/ssh rw,nosuid,nodev,relatime - fuse.sshfs me@host:/data rw,user_id=1000,group_id=1000"
BINDFS = "102 29 0:59 / /mnt/b rw,nosuid,nodev,relatime - fuse /srv/s3fs rw,user_id=0,group_id=0,default_permissions"
VIRTIOFS = "103 29 0:60 / /shared rw,relatime - virtiofs myfs rw"
PLAN9 = "104 29 0:62 / /mnt/wsl rw,relatime - 9p drvfs rw,dirsync,aname=drvfs;path=C:\\134,cache=mmap,msize=65536"
OVERLAY = (
    "1000 900 0:70 / / rw,relatime master:500 - overlay overlay rw,lowerdir=/var/lib/a:/var/lib/b,upperdir=/var/lib/c,"
    "workdir=/var/lib/d,index=off"
)
EXT4 = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw{}"
XFS = "28 27 254:16 / /data rw,noatime shared:2 - xfs /dev/vdb rw,attr2,inode64,logbufs=8,logbsize=32k{}"
ZFS = "29 27 0:80 / /tank rw,xattr,noacl - zfs tank/runs rw,xattr,noacl"
TMPFS = "30 25 0:27 / /dev/shm rw,nosuid,nodev - tmpfs tmpfs rw,size=24684096k"
VFAT = "31 27 8:17 / /media/stick rw,nosuid - vfat /dev/sdb1 rw,fmask=0022,dmask=0022,codepage=437,iocharset=ascii"
NEWFS = "32 27 0:90 / /new rw - newfs4 thing rw"


def only(line: str) -> Mount:
    (mount,) = parse_mountinfo(line).values()
    return mount


@pytest.mark.parametrize(
    ("line", "name", "kind", "level", "reach"),
    [
        (EXT4.format(""), "ext4", Kind.LOCAL, Level.OK, Reach.ALONE),
        (XFS.format(""), "XFS", Kind.LOCAL, Level.OK, Reach.ALONE),
        (ZFS, "ZFS", Kind.LOCAL, Level.OK, Reach.ALONE),
        (VFAT, "FAT", Kind.LOCAL, Level.ERROR, Reach.ALONE),
        (TMPFS, "tmpfs", Kind.MEMORY, Level.ERROR, Reach.ALONE),
        (OVERLAY, "overlayfs", Kind.LAYER, Level.WARNING, Reach.ALONE),
        (NFS4, "NFS", Kind.NETWORK, Level.WARNING, Reach.ALL),
        (NFS3_SOFT_NOLOCK, "NFS", Kind.NETWORK, Level.WARNING, Reach.HOST),
        (LUSTRE.format(""), "Lustre", Kind.NETWORK, Level.WARNING, Reach.UNKNOWN),
        (LUSTRE.format("flock,"), "Lustre", Kind.NETWORK, Level.WARNING, Reach.ALL),
        (LUSTRE.format("localflock,"), "Lustre", Kind.NETWORK, Level.WARNING, Reach.HOST),
        (LUSTRE.format("noflock,"), "Lustre", Kind.NETWORK, Level.WARNING, Reach.HOST),
        (GPFS, "GPFS", Kind.NETWORK, Level.WARNING, Reach.UNKNOWN),
        (BEEGFS, "BeeGFS", Kind.NETWORK, Level.WARNING, Reach.UNKNOWN),
        (CEPH, "CephFS", Kind.NETWORK, Level.WARNING, Reach.ALL),
        (CEPH_FUSE, "CephFS", Kind.NETWORK, Level.WARNING, Reach.ALL),
        (CIFS.format(""), "SMB", Kind.NETWORK, Level.WARNING, Reach.ALL),
        (CIFS.format("nobrl,"), "SMB", Kind.NETWORK, Level.WARNING, Reach.HOST),
        (VIRTIOFS, "virtiofs", Kind.NETWORK, Level.WARNING, Reach.UNKNOWN),
        (PLAN9, "9p", Kind.NETWORK, Level.WARNING, Reach.UNKNOWN),
        (SSHFS, "sshfs", Kind.NETWORK, Level.WARNING, Reach.HOST),
        (JUICEFS, "JuiceFS", Kind.NETWORK, Level.WARNING, Reach.ALL),
        (S3FS, "s3fs", Kind.OBJECT_STORE, Level.ERROR, Reach.HOST),
        (GCSFUSE, "gcsfuse", Kind.OBJECT_STORE, Level.ERROR, Reach.HOST),
        (MOUNT_S3, "mountpoint-s3", Kind.OBJECT_STORE, Level.ERROR, Reach.HOST),
        (RCLONE, "rclone", Kind.OBJECT_STORE, Level.ERROR, Reach.HOST),
        (BINDFS, "FUSE", Kind.USER_SPACE, Level.WARNING, Reach.UNKNOWN),
        (BINDFS.replace("fuse /srv", "fuse.mine /srv"), "FUSE (mine)", Kind.USER_SPACE, Level.WARNING, Reach.UNKNOWN),
        (BINDFS.replace("/srv/s3fs", "mine"), "FUSE (mine)", Kind.USER_SPACE, Level.WARNING, Reach.UNKNOWN),
        (NEWFS, "newfs4", Kind.UNKNOWN, Level.WARNING, Reach.UNKNOWN),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 16 else "",
)
def test_a_mount_is_known_by_its_line(line: str, name: str, kind: Kind, level: Level, reach: Reach) -> None:
    mount = only(line)
    known = file_system(mount)

    assert (known.name, known.kind, known.level, reach_of_locks(mount)[0]) == (name, kind, level, reach)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (EXT4.format(""), {}),
        (EXT4.format(",barrier=0"), {"barrier=0": Level.WARNING}),
        (EXT4.format(",nobarrier,data=writeback"), {"nobarrier": Level.WARNING, "data=writeback": Level.INFO}),
        (EXT4.format(",data=ordered,commit=30,errors=remount-ro"), {}),
        (XFS.format(",nobarrier"), {"nobarrier": Level.WARNING}),
        (OVERLAY + ",volatile", {"volatile": Level.ERROR}),
        (NFS4, {}),
        (NFS4.replace("hard", "softerr") + ",nocto", {"softerr": Level.WARNING, "nocto": Level.WARNING}),
        (
            NFS3_SOFT_NOLOCK,
            {"nolock": Level.WARNING, "local_lock=all": Level.WARNING, "soft": Level.WARNING},
        ),
        (NFS4.replace("local_lock=none", "local_lock=posix"), {"local_lock=posix": Level.WARNING}),
        (LUSTRE.format("flock,"), {}),
        (LUSTRE.format("localflock,"), {"localflock": Level.WARNING}),
        (LUSTRE.format("noflock,"), {"noflock": Level.WARNING}),
        # SMB is mounted soft unless somebody asks for hard: no news.
        (CIFS.format(""), {}),
        (CIFS.format("nobrl,nostrictsync,"), {"nobrl": Level.WARNING, "nostrictsync": Level.WARNING}),
        (CIFS.format("").replace("cache=strict", "cache=loose"), {"cache=loose": Level.WARNING}),
        (PLAN9, {"cache=mmap": Level.WARNING}),
        (EXT4.format("").replace("rw,relatime", "ro,relatime"), {"ro": Level.ERROR}),
        (EXT4.format("").replace("vda1 rw", "vda1 ro"), {"ro": Level.ERROR}),
    ],
)
def test_options_that_take_something_away_are_found_and_no_others(line: str, expected: dict[str, Level]) -> None:
    assert {text: option.level for text, option in options_that_matter(only(line))} == expected


def test_the_line_of_a_mount_is_read_whole() -> None:
    text = (
        r"36 35 98:0 /a\040b /mnt/with\040space\134and\011tab rw,noatime shared:1 master:2 - ext3 /dev/my\040disk "
        r"rw,a=b\054"
        "\n37 35 0:9 / /sys rw - cgroup2  rw\n38 35 0:10 / /x ro,nosuid - tmpfs none rw,size=1k\nnonsense\n\n39 - a b"
    )
    mounts = parse_mountinfo(text)

    assert list(mounts) == [36, 37, 38]
    assert mounts[36] == Mount(
        "ext3", "/dev/my disk", "/mnt/with space\\and\ttab", ("rw", "noatime", "a=b,"), device="98:0"
    )
    assert (mounts[37].type, mounts[37].source) == ("cgroup2", "")
    assert mounts[38].options == ("ro", "nosuid", "size=1k")


def test_a_name_with_other_line_ends_breaks_no_line() -> None:
    mounts = parse_mountinfo("36 35 98:0 / /mnt/a\u2028b\x0bc rw - ext4 /dev/x rw\n37 35 0:9 / /y rw - xfs /dev/y rw")

    assert [mount.point for mount in mounts.values()] == ["/mnt/a\u2028b\x0bc", "/y"]


def test_the_mount_over_a_path_is_the_deepest_and_topmost() -> None:
    points = ["/", "/a", "/a/b", "/a", "/a/bc"]
    mounts = [Mount(str(number), "", point) for number, point in enumerate(points)]

    def over(path: str) -> str:
        found = mount_over(mounts, path)
        assert found is not None
        return found.type

    assert [over(path) for path in ("/", "/x", "/a", "/a/x", "/a/b", "/a/b/c", "/a/bc", "/a/bcd", "/ab")] == [
        *("0", "0", "3", "3", "2", "2", "4", "3", "0")
    ]
    assert mount_over([], "/") is None


def test_every_row_says_what_to_do_about_what_it_does_not_promise() -> None:
    for name, row in FILE_SYSTEMS.items():
        assert row.name, name
        assert row.text, name
        assert (row.level is Level.OK) == (row.hint == ""), name
        assert row.reach is Reach.ALONE or row.locks, name
    for option in OPTIONS:
        assert option.hint or option.level is Level.INFO, option
        re.compile(option.pattern)


def test_the_numbers_of_statfs_name_known_types() -> None:
    assert {name for name in MAGIC.values() if name not in FILE_SYSTEMS} == set()
