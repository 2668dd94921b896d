"""Every error the package raises on purpose.

Why one module: callers catch by cause, not by module. A message says what happened, to which
object, and what to do about it. Kernel failures stay ``OSError`` with their errno; programming
errors inside the package are assertions.
"""

from __future__ import annotations

import os


class CascadeError(Exception):
    """Base of all errors of this package."""


class ConfigError(CascadeError, ValueError):
    """A setting, an argument or a directory is not usable; the message names it and the cure."""


class ClosedError(CascadeError):
    """The object was closed by its user; nothing can be done with it any more."""


class BrokenTierError(CascadeError):
    """A tier was broken from outside (I/O errors, lost device); what other tiers hold still reads."""


class TierStalledError(BrokenTierError):
    """A tier does not answer. Nothing is known to be lost: it may answer later, and then all goes on."""


class BlockNotFoundError(CascadeError, LookupError):
    """No tier holds the block: the caller recomputes it."""


class TierFullError(CascadeError):
    """A tier has no room and cannot make any now (pinned leases, disk full, budget spent)."""


class BlockTooLargeError(TierFullError, ValueError):
    """The block can never fit: it is larger than the tier or than the format allows."""


class ThrottledError(CascadeError):
    """A bounded queue stayed full for longer than the caller was willing to wait."""


class LeaseError(CascadeError):
    """A lease was used after release, released twice, or belongs to another store."""


class DigestConflictError(CascadeError, ValueError):
    """Two different blocks share a BlockId (same first 128 bits, other lengths or digest)."""


class CorruptionError(CascadeError):
    """Stored bytes are not what was written.

    Attributes: ``path`` of the file, ``segment`` (its name within the root) and ``offset`` in bytes
    of the damage, ``expected`` and ``found`` as short printable values. ``None`` where unknown.
    ``reason``: the message without the place.
    ``unreadable``: the bytes could not be read; nothing is known about them, and another attempt may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        segment: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        unreadable: bool = False,
    ) -> None:
        self.unreadable = unreadable
        self.path = None if path is None else os.fspath(path)
        self.segment = segment
        self.offset = offset
        self.expected = expected
        self.found = found
        where = "" if path is None else f" in {self.path}"
        if offset is not None:
            where += f" at offset {offset}"
        detail = "" if expected is None and found is None else f" (expected {expected}, found {found})"
        self.reason = f"{message}{detail}"
        super().__init__(f"{message}{where}{detail}")


class ProtocolError(CascadeError):
    """A peer sent bytes that the protocol does not allow."""


class ServiceUnavailableError(CascadeError):
    """The node service does not answer; the message names its socket."""


class InternalError(CascadeError):
    """A promise of the package itself was broken: please report it."""
