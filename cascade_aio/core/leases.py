"""Who may read what right now: accounting of leases by row and in total.

The ledger counts; it pins nothing itself, frees nothing and holds no bytes. ``where`` is free text
naming the place a lease was taken, kept for the message about a lease nobody released.

Invariants: numbers are never reused; a row is counted as long as it has a lease, and its bytes are
counted once however many leases it has. Everything but ``oldest`` and ``of_row`` is O(1); memory is
bounded by ``leases_max``.
"""

from __future__ import annotations

from typing import NamedTuple

from cascade_aio.errors import LeaseError

LEASES_MAX_DEFAULT = 1 << 20
"""Leases outstanding at once: a program that reaches it (~250 MB of ledger) forgets to release."""


class LeaseRecord(NamedTuple):
    """One outstanding lease. ``where`` is ``None`` unless the taker gave a place."""

    number: int
    row: int
    nbytes: int
    where: str | None


class LeaseLedger:
    """Outstanding leases of one tier. Not thread-safe; nothing blocks."""

    def __init__(self, *, leases_max: int = LEASES_MAX_DEFAULT) -> None:
        assert leases_max > 0, "a ledger has room for a lease"
        self._leases_max = leases_max
        self._leases: dict[int, tuple[int, int, str | None]] = {}
        self._count_of_row: dict[int, int] = {}
        self._next_number = 1
        self._pinned_bytes = 0

    def take(self, row: int, nbytes: int, where: str | None = None) -> int:
        """Note a lease on ``row``, whose copy has ``nbytes``; returns its number (from 1 upwards).

        Raises ``LeaseError`` when ``leases_max`` are outstanding.
        """
        if len(self._leases) >= self._leases_max:
            raise LeaseError(
                f"{len(self._leases)} leases are outstanding, the most there may be; release blocks after use"
                f"{self._oldest_text()}"
            )
        number = self._next_number
        self._next_number = number + 1
        count = self._count_of_row.get(row, 0)
        self._count_of_row[row] = count + 1
        if not count:
            self._pinned_bytes += nbytes
        self._leases[number] = (row, nbytes, where)
        return number

    def release(self, number: int) -> int:
        """End a lease; returns its row. Raises ``LeaseError`` for one released before or never taken."""
        lease = self._leases.pop(number, None)
        if lease is None:
            state = "was released before" if 0 < number < self._next_number else "was never taken here"
            raise LeaseError(f"lease {number} {state}; release every block exactly once, in the store it came from")
        row, nbytes, _ = lease
        count = self._count_of_row[row] - 1
        if count:
            self._count_of_row[row] = count
        else:
            del self._count_of_row[row]
            self._pinned_bytes -= nbytes
        return row

    def count(self, row: int) -> int:
        """Leases outstanding on ``row``."""
        return self._count_of_row.get(row, 0)

    def of_row(self, row: int) -> list[LeaseRecord]:
        """The leases on ``row``, oldest first: for messages (O(leases))."""
        return [LeaseRecord(number, *lease) for number, lease in self._leases.items() if lease[0] == row]

    def oldest(self) -> LeaseRecord | None:
        """The lease held longest, or ``None``: for messages."""
        number = next(iter(self._leases), None)
        return None if number is None else LeaseRecord(number, *self._leases[number])

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def pinned_rows(self) -> int:
        return len(self._count_of_row)

    @property
    def pinned_bytes(self) -> int:
        """Bytes that cannot be evicted: each leased row once."""
        return self._pinned_bytes

    def _oldest_text(self) -> str:
        oldest = self.oldest()
        return f"; the oldest was taken at {oldest.where}" if oldest is not None and oldest.where else ""
