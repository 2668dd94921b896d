"""File systems to crash on: the one that is there, or one on a loop device that can be made to fail for real.

``open_disk("ext4", directory)`` gives a fresh file system of that kind. It lies in an image file on an *outer* ext4,
itself on a loop device, so that its device has what the device of a plain loop mount has not: a volatile
write cache. A flush of the inner file system becomes an ``fsync`` of its image in the outer one; ``cut_power``
shuts the outer one down without writing its journal or a single dirty page. What was flushed is there
afterwards, of the rest what happened to be written back.

Everything is mounted, used and unmounted by one scope, also on Ctrl-C. Takes root, ``mount``, ``mkfs``.
What it must not know: what is stored there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from cascade_aio.config import MIB

FILE_SYSTEMS = ("here", "ext4", "xfs")
"""``here`` is whatever holds the directory."""

_MKFS = {"ext4": ("mkfs.ext4", "-q", "-m", "0"), "xfs": ("mkfs.xfs", "-q")}
_OPTIONS = {"ext4": "loop,errors=remount-ro", "xfs": "loop"}
_PACKAGES = {"ext4": "e2fsprogs", "xfs": "xfsprogs"}

OUTER_BYTES = 900 * MIB
INNER_BYTES = 640 * MIB
"""mkfs.xfs makes nothing smaller than 300 MiB. Both images are sparse."""

UNMOUNT_SECONDS_MAX = 60.0
"""A file system stays busy until the kernel has put away a killed process; then it is detached by force."""

_SHUTDOWN = 0x8004587D
"""``_IOR('X', 125, __u32)``: XFS_IOC_GOINGDOWN, and since Linux 4.11 EXT4_IOC_SHUTDOWN."""

_WITHOUT_LOG = struct.pack("I", 2)


class Disk:
    """``place`` is where to write. ``faults`` names what this file system can be made to suffer."""

    faults: tuple[str, ...] = ()

    def __init__(self, kind: str, place: Path) -> None:
        self.kind = kind
        self.place = place

    def suffering(self, fault: str) -> AbstractContextManager[None]:
        """Suffer one of ``faults``; at the end of the scope, when nobody uses the place any more, it is mended."""
        raise AssertionError(f"{self.kind} cannot suffer {fault}")


class LoopDisk(Disk):
    """A file system of ``kind`` on a loop device with a volatile write cache."""

    def __init__(self, kind: str, directory: Path) -> None:
        super().__init__(kind, directory / kind)
        self.faults = ("full", "shut down", "power cut") + (("read-only",) if kind == "ext4" else ())
        self._outer = directory / "outer"
        self._outer_image = directory / "outer.image"
        self._image = self._outer / "inner.image"
        self._filler = self.place / "filler"

    def make(self) -> None:
        """Make both file systems and mount them."""
        for image, nbytes, kind in ((self._outer_image, OUTER_BYTES, "ext4"), (self._image, INNER_BYTES, self.kind)):
            with image.open("wb") as file:
                file.truncate(nbytes)
            _run(*_MKFS[kind], str(image))
            if image == self._outer_image:
                self._outer.mkdir()
                self._mount_outer()
        self.place.mkdir()
        self._mount_inner()
        _run("sync", "--file-system", str(self._outer))  # the empty file system is no part of what may be lost

    def remove(self) -> None:
        """Unmount and delete everything."""
        for point in (self.place, self._outer):
            _unmount(point)
            with contextlib.suppress(FileNotFoundError):
                point.rmdir()
        self._outer_image.unlink(missing_ok=True)

    @contextlib.contextmanager
    def suffering(self, fault: str) -> Iterator[None]:
        assert fault in self.faults, (fault, self.faults)
        if fault == "full":
            self._fill()
            try:
                yield
            finally:
                self._filler.unlink()
                # Else the next fault brings it back: a file system without its journal has not forgotten it.
                _run("sync", "--file-system", str(self.place))
            return
        if fault == "read-only":
            device = os.stat(self.place).st_dev
            name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
            Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("cascade_aio")
        else:
            _shut_down(self._outer if fault == "power cut" else self.place)
        try:
            yield
        finally:
            _unmount(self.place)
            _await_released(self._image)
            if fault == "power cut":
                _unmount(self._outer)
                _await_released(self._outer_image)
                self._mount_outer()
            self._mount_inner()

    def _fill(self) -> None:
        """Take all room. Whoever writes meanwhile takes some of it."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            end = 0
            for step in (8 * MIB, MIB, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(descriptor, end, step)
                        end += step
        finally:
            os.close(descriptor)

    def _mount_outer(self) -> None:
        _run("mount", "-o", "loop", str(self._outer_image), str(self._outer))

    def _mount_inner(self) -> None:
        _run("mount", "-o", _OPTIONS[self.kind], str(self._image), str(self.place))


def missing_for(kind: str) -> str | None:
    """Why a file system of this kind cannot be had here, or ``None``."""
    assert kind in FILE_SYSTEMS, kind
    if kind == "here":
        return None
    if os.geteuid() != 0:
        return "mounting a loop device takes root"
    for program, package in (
        ("mount", "util-linux"),
        ("mkfs.ext4", _PACKAGES["ext4"]),
        (_MKFS[kind][0], _PACKAGES[kind]),
    ):
        if shutil.which(program) is None:
            return f"{program} is missing: install {package}"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    known = Path("/proc/filesystems").read_text().split()
    return None if kind in known else f"this kernel has no {kind}"


@contextlib.contextmanager
def open_disk(kind: str, directory: Path) -> Iterator[Disk]:
    """A disk for the length of the scope; ``directory`` (empty or new) holds its images and mount points.

    Raises ``OSError`` with the words of ``mount`` or ``mkfs`` if it cannot be made; ask ``missing_for`` before.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "here":
        yield Disk(kind, directory)
        return
    disk = LoopDisk(kind, directory)
    try:
        disk.make()
        yield disk
    finally:
        disk.remove()


def _shut_down(place: Path) -> None:
    """The file system fails from now on; what it had not written, journal included, is dropped."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _SHUTDOWN, _WITHOUT_LOG)
    finally:
        os.close(descriptor)


def _unmount(point: Path) -> None:
    """Unmount if mounted."""
    until_s = time.monotonic() + UNMOUNT_SECONDS_MAX
    while os.path.ismount(point) or _is_dead(point):
        done = subprocess.run(["umount", str(point)], capture_output=True, text=True, check=False)
        if done.returncode and time.monotonic() > until_s:
            _run("umount", "--lazy", str(point))
            raise OSError(errno.EBUSY, f"detached while in use: {done.stderr.strip()}", str(point))
        if done.returncode:
            time.sleep(0.02)


def _await_released(image: Path) -> None:
    """Return once its loop device is gone. A copy of the mount in another mount namespace keeps the file system, which
    would be found again as it is: failing. Raises ``OSError``."""
    until_s = time.monotonic() + UNMOUNT_SECONDS_MAX
    while done := subprocess.run(["losetup", "-j", str(image)], capture_output=True, text=True, check=True).stdout:
        if time.monotonic() > until_s:
            raise OSError(errno.EBUSY, f"still in use, perhaps in another mount namespace: {done.strip()}", str(image))
        time.sleep(0.02)


def _is_dead(point: Path) -> bool:
    """A file system that was shut down answers nothing, not even that it is a mount point."""
    try:
        os.stat(point)
    except OSError as error:
        return error.errno == errno.EIO
    return False


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(errno.EIO, f"{' '.join(command[:3])} failed: {done.stderr.strip()}")
