"""The environment of a run: code, versions, kernel, CPU, memory, file system, device kind, counters.

Reads ``/proc``, ``/sys`` and git; changes nothing. No host name, user name or absolute path goes into
what it returns: result files are published.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess

import cascade_aio
from bench.results import BenchError, Environment

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("blake3", "cffi", "crc32c", "numpy")
"""Libraries whose version changes what is measured."""
NOT_CODE = (":(exclude)bench/results", ":(exclude)README.md")
"""What a run and the table write themselves does not make the measured code dirty."""
_DEVICE_KINDS = {
    "nvme": "NVMe",
    "vd": "virtio disk",
    "xvd": "Xen disk",
    "sd": "SCSI/SATA disk",
    "dm-": "device mapper",
    "md": "software RAID",
    "loop": "loop device",
}


def describe(folder: pathlib.Path) -> Environment:
    """The environment of a run whose files are in ``folder``. Raises ``BenchError`` outside a checkout."""
    return Environment(
        version=cascade_aio.__version__,
        commit=_git("rev-parse", "HEAD"),
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE)),
        python=platform.python_version(),
        packages={name: _version(name) or "missing" for name in PACKAGES},
        kernel=platform.release(),
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        file_system=_file_system(folder),
        device=_device(folder),
    )


def cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_s() -> float:
    """CPU seconds of this process so far, user and system, all its threads (io_uring's workers too)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def storage_read_bytes() -> int:
    """Bytes this process has caused to be read from storage: page-cache hits do not count."""
    for line in pathlib.Path("/proc/self/io").read_text().splitlines():
        name, _, count = line.partition(":")
        if name == "read_bytes":
            return int(count)
    raise BenchError("/proc/self/io has no read_bytes: the kernel lacks CONFIG_TASK_IO_ACCOUNTING")


def resident_bytes() -> int:
    """Private resident memory of this process (anonymous pages; the arena is shared and not counted)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise BenchError("/proc/self/status has no RssAnon line")


def available_bytes() -> int:
    """Memory that can be had without swapping, by the kernel's estimate."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise BenchError("/proc/meminfo has no MemAvailable line")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"git {arguments[0]} failed ({done.stderr.strip()}): results name the commit they measured")
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: pathlib.Path) -> str:
    """Type of the file system that holds ``folder``: the mount with the longest matching path."""
    target = folder.resolve()
    best, kind = -1, "unknown"
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, mount, fs_type = line.split()[:3]
        point = pathlib.Path(mount.encode().decode("unicode_escape"))
        if len(point.parts) >= best and target.is_relative_to(point):
            best, kind = len(point.parts), fs_type
    return kind


def _device(folder: pathlib.Path) -> str:
    number = os.stat(folder).st_dev
    entry = pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        return "no block device"
    name = entry.resolve().name
    return next((kind for prefix, kind in _DEVICE_KINDS.items() if name.startswith(prefix)), "block device")
