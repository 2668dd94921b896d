"""Checks of ``doctor`` that look at the root: its file system, direct I/O (really tried), Lustre.

They block for milliseconds and write one page to an unnamed file that vanishes with its descriptor.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import shutil
import tempfile

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.cli.findings import Finding
from cascade_aio.config import StoreConfig, format_size
from cascade_aio.errors import ConfigError
from cascade_aio.io.storage import open_storage
from cascade_aio.segments.layout import look_at_root

LUSTRE_MAGIC = 0x0BD00BD0
DISK_FREE_BYTES_MIN = 1 << 30

# f_type of statfs(2), from linux/magic.h and the file systems' own headers
FILE_SYSTEM_NAMES = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlayfs",
    0x6969: "nfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x65735546: "fuse",
    0x00C36400: "ceph",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x01021997: "9p",
    LUSTRE_MAGIC: "lustre",
}
_STATFS_BYTES = 256
"""Larger than struct statfs on every Linux ABI; f_type is its first word."""


def nearest_directory(path: str) -> str:
    """``path`` or its nearest ancestor that exists: what a root that is still to be made lies on."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def file_system_magic(path: str) -> int:
    """``f_type`` of the file system of ``path`` (statfs(2)); ``os.statvfs`` does not give it."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF


def file_system_name(path: str) -> str:
    magic = file_system_magic(path)
    return FILE_SYSTEM_NAMES.get(magic, f"type {magic:#x}")


def try_direct_write(directory: str) -> str | None:
    """Write and read back one aligned page with O_DIRECT; ``None`` if that works, else the reason."""
    with mmap.mmap(-1, 2 * PAGE_BYTES) as memory:
        memory[:PAGE_BYTES] = bytes(range(256)) * (PAGE_BYTES // 256)
        try:
            with tempfile.TemporaryFile(dir=directory, prefix=".cascade-doctor-") as file:
                fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
                try:
                    with memoryview(memory) as view, view[:PAGE_BYTES] as page, view[PAGE_BYTES:] as back:
                        os.pwritev(fd, [page], 0)
                        os.preadv(fd, [back], 0)
                        return None if page == back else "the page came back different"
                finally:
                    os.close(fd)
        except OSError as error:
            return error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")


async def _look(config: StoreConfig) -> None:
    storage = open_storage("threads")
    try:
        await look_at_root(storage, config.root, config.digest)
    finally:
        await storage.aclose()


def check_root(config: StoreConfig) -> Finding:
    """Whether a store could be opened and written at the root, and how much room there is; changes nothing."""
    try:
        asyncio.run(_look(config))  # what an open would look at, before anything is written
    except ConfigError as error:
        found, _, cure = str(error).partition(": ")
        return Finding("root", "fatal", found, "a store cannot be opened here", cure or "choose another root")
    where = nearest_directory(config.root)
    found = f"{config.root} on {file_system_name(where)}"
    if not os.access(where, os.W_OK | os.X_OK):
        return Finding("root", "fatal", f"{where} is not writable", "no segment can be written", "choose another root")
    free = shutil.disk_usage(where).free
    found += f", {format_size(free)} free"
    wanted = config.disk_bytes or DISK_FREE_BYTES_MIN
    if free < min(wanted, DISK_FREE_BYTES_MIN):
        return Finding("root", "warning", found, "little room for segments", "free some space or choose another root")
    if config.disk_bytes is not None and free < config.disk_bytes:
        meaning = f"less than the budget of {format_size(config.disk_bytes)}"
        return Finding("root", "warning", found, meaning, "lower disk_bytes or free some space")
    return Finding("root", "ok", found, "segments can be written")


def check_direct_io(config: StoreConfig) -> Finding:
    where = nearest_directory(config.root)
    reason = try_direct_write(where)
    if reason is None:
        return Finding(
            "direct I/O", "ok", f"an aligned page was written and read in {where}", "the page cache is bypassed"
        )
    meaning = "files go through the page cache: slower, and memory is used twice"
    return Finding("direct I/O", "warning", f"{where}: {reason}", meaning, "put the root on ext4, xfs or Lustre")


def check_lustre(config: StoreConfig) -> Finding:
    lustre = file_system_magic(nearest_directory(config.root)) == LUSTRE_MAGIC
    tool = shutil.which("lfs")
    if not lustre:
        return Finding("lustre", "ok", "the root is not on Lustre", "plain files, no striping needed")
    if tool is None:
        return Finding(
            "lustre", "warning", "on Lustre, no lfs tool", "segments use the default striping", "install lfs"
        )
    return Finding("lustre", "ok", f"on Lustre, {tool}", f"new segments get {config.stripe_count} stripes")
