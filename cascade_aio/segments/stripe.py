"""Striping on Lustre, so that one segment is served by many object servers.

A writer directory gets its layout before files are created in it; the files inherit it. Anywhere but
on Lustre nothing is done. The file system is recognised by its type in the mount table (Python's
``statvfs`` does not tell the statfs type 0x0BD00BD0). A store works without striping, only slower, so
nothing here raises for the outside world: the report says what happened.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil

LFS_SECONDS_MAX = 20.0
"""``lfs`` waits for the metadata server; one that does not answer must not keep a store from opening."""

STRIPE_COUNT_DEFAULT = 16
STRIPE_BYTES_DEFAULT = 4 << 20

_MESSAGE_CHARS_MAX = 300


@dataclasses.dataclass(frozen=True, slots=True)
class StripeReport:
    """``file_system`` as the mount table calls it, whether the directory is striped now, and what to know."""

    file_system: str
    striped: bool
    warning: str | None = None


async def prepare_directory(
    path: str,
    count: int = STRIPE_COUNT_DEFAULT,
    stripe_bytes: int = STRIPE_BYTES_DEFAULT,
    *,
    asked: bool = False,
    file_system: str | None = None,
) -> StripeReport:
    """Stripe new files of the existing directory ``path`` over ``count`` servers (-1: all), if on Lustre.

    ``asked`` tells that the user wanted striping explicitly: only then is another file system worth
    a warning. ``file_system`` overrides the detection. May be cancelled; the child is ended then.
    """
    kind = file_system_of(path) if file_system is None else file_system
    if kind != "lustre":
        warning = f"{path} is on {kind}, not Lustre: stripe settings have no effect; plain files are used"
        return StripeReport(kind, False, warning if asked else None)
    lfs = shutil.which("lfs")
    if lfs is None:
        return StripeReport(
            kind, False, f"{path} is on Lustre, but `lfs` is not on PATH: files keep the default layout"
        )
    arguments = ["setstripe", "-c", str(count), "-S", str(stripe_bytes), path]
    problem = await _run(lfs, arguments)
    if problem is None:
        return StripeReport(kind, True)
    return StripeReport(
        kind, False, f"`lfs {' '.join(arguments)}` failed ({problem}): files keep the default layout of {path}"
    )


async def _run(program: str, arguments: list[str]) -> str | None:
    """``None`` if it succeeded, else what went wrong."""
    try:
        child = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as exc:
        return str(exc.strerror)
    try:
        async with asyncio.timeout(LFS_SECONDS_MAX):
            _, errors = await child.communicate()
    except TimeoutError:
        return f"no answer within {LFS_SECONDS_MAX:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode == 0:
        return None
    return errors.decode(errors="replace").strip()[:_MESSAGE_CHARS_MAX] or f"exit status {child.returncode}"


def file_system_of(path: str, mounts: str | None = None) -> str:
    """The type of the file system that holds ``path`` ("unknown" where there is no mount table)."""
    if mounts is None:
        try:
            with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
                mounts = table.read()
        except OSError:
            return "unknown"
    resolved = os.path.realpath(path)
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), fields[2]
    return kind
