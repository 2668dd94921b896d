"""Who may say of a writer that it is dead: a free lock is proof only where its holder's lock would have been seen.

Advisory locks of shared file systems may be local to a node (Lustre ``localflock``, NFS ``local_lock``), and those
that are not are taken from a client that loses its connection while its processes live on. Host names prove
nothing: containers and images share them. So a lock that is free proves that a writer is dead if

* the file system can only be mounted by one kernel (ext4, XFS, …): whoever is alive is in it, or
* the writer was a process of this very boot of this kernel: it would hold its lock here.

Everything else is left alone, and said so. Pure but for ``this_host``.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Mapping
from typing import Any

from cascade_aio.segments.stripe import file_system_of

SINGLE_KERNEL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "jfs", "tmpfs", "ramfs"}
)
"""File systems, by their name in the mount table, that one kernel at a time can have mounted."""

_BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """Where this process runs. ``boot`` names the running kernel ("" where that is not known);
    ``sees_all_locks``: whoever can have the root open is in this kernel."""

    name: str
    boot: str
    sees_all_locks: bool = False


def this_host(root: str) -> Host:
    """This process, as a writer of ``root``. Reads two small files of /proc."""
    try:
        with open(_BOOT_ID_FILE, encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return Host(socket.gethostname(), boot, file_system_of(root) in SINGLE_KERNEL_FILE_SYSTEMS)


def why_a_free_lock_proves_nothing(description: Mapping[str, Any], host: Host) -> str | None:
    """Of a writer directory described by its ``writer.json``: ``None`` if whoever held its lock is dead once the
    lock is free, else why that cannot be told from here."""
    if host.sees_all_locks or (host.boot and description.get("boot") == host.boot):
        return None
    other = description.get("host")
    if other != host.name:
        return f"it was written on host {other}, whose locks may not be seen from here"
    return f"it was written by another boot of a host named {other}, whose locks may not be seen from here"
