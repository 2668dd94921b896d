"""Leases: the right to read one block in place, and the request objects that give them.

A ``Block`` pins its copy in the arena until it is released. Its buffers are read-only NumPy views of
the arena itself: no copy is made. A buffer that outlives its lease keeps the memory pinned until it
is garbage-collected, so bytes never change under a reader; a lease that is never released warns with
the place where it was taken.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec
import numpy as np
import numpy.typing as npt

from cascade_aio.errors import LeaseError
from cascade_aio.model import BlockId, BlockMeta, PrefixKey, Tier

if TYPE_CHECKING:
    from cascade_aio.store.catalog import Copy
    from cascade_aio.store.getting import Getter

_PASSED_BY = (__name__.partition(".")[0] + ".", "asyncio.")
"""Modules that are never the place where a lease was taken."""

_meta_decoder = msgspec.msgpack.Decoder(BlockMeta)


def encode_meta(meta: BlockMeta) -> bytes:
    """The bytes of ``meta`` in a record header."""
    return msgspec.msgpack.encode(meta)


class Lender(Protocol):
    """Who takes leases back."""

    def release(self, copy: Copy, number: int) -> None:
        """On the loop's thread, from ordinary code."""
        ...

    def release_later(self, copy: Copy, number: int) -> None:
        """From any thread and from finalizers, which may run in the middle of anything."""
        ...


class Block:
    """A leased block. Created by ``store.get``; release it with ``release()`` or ``with block:``."""

    __slots__ = ("__weakref__", "_copy", "_key", "_lender", "_number", "_value", "_views", "_where", "tier")

    def __init__(self, copy: Copy, tier: Tier, lender: Lender, number: int, where: str) -> None:
        self._copy: Copy | None = copy
        self._lender = lender
        self._number = number
        self._key: npt.NDArray[np.uint8] | None = None
        self._value: npt.NDArray[np.uint8] | None = None
        self._views: list[memoryview] | None = None
        self._where = where
        self.tier = tier
        """Where the block was found when it was asked for."""

    def _leased(self) -> Copy:
        if self._copy is None:
            raise LeaseError(f"this lease was released already (taken at {self._where}); get the block again")
        return self._copy

    @property
    def block_id(self) -> BlockId:
        return self._leased().block_id

    @property
    def key(self) -> npt.NDArray[np.uint8]:
        """The key part: read-only uint8 array of shape (key_bytes,), in the arena, no copy (DLPack works)."""
        if self._key is None:
            self._key = self._view(self._leased().key_view())
        return self._key

    @property
    def value(self) -> npt.NDArray[np.uint8]:
        """The value part, like ``key``; its address is 64-byte aligned."""
        if self._value is None:
            self._value = self._view(self._leased().value_view())
        return self._value

    def views(self) -> tuple[memoryview, memoryview]:
        """Key and value as read-only memoryviews. Unlike the arrays they do not keep the memory pinned:
        they must not be used after ``release``."""
        copy = self._leased()
        return copy.key_view(), copy.value_view()

    def _view(self, view: memoryview) -> npt.NDArray[np.uint8]:
        if self._views is None:
            self._views = []
        self._views.append(view)
        return np.frombuffer(view, dtype=np.uint8)

    @property
    def meta(self) -> BlockMeta | None:
        """What was stored as ``meta``, or ``None``."""
        raw = self._leased().meta
        return _meta_decoder.decode(raw) if raw else None

    @property
    def released(self) -> bool:
        return self._copy is None

    def release(self) -> None:
        """Give the lease back. Arrays taken from it keep the memory pinned until they are gone.

        Does not block. Raises ``LeaseError`` when released twice.
        """
        copy = self._leased()
        self._copy = None
        if self._views is None:
            self._lender.release(copy, self._number)
        else:
            self._release_views(copy)

    def _release_views(self, copy: Copy) -> None:
        """Release now if nobody else refers to the arrays, else when the last of them dies."""
        arrays, views = [self._key, self._value], self._views
        self._key = self._value = self._views = None
        assert views is not None
        survivors = _Survivors(copy, self._lender, self._number)
        for array in arrays:
            if array is not None:
                survivors.watch(array)
        del array, arrays
        del views
        survivors.armed()

    def __enter__(self) -> Self:
        self._leased()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._copy is not None:
            self.release()

    def __del__(self) -> None:
        copy = getattr(self, "_copy", None)
        if copy is not None:
            warnings.warn(
                f"a lease on block {copy.block_id} taken at {self._where} was never released; "
                "use 'async with store.get(...)' or call release()",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )
            self._lender.release_later(copy, self._number)

    def __repr__(self) -> str:
        if self._copy is None:
            return "Block(released)"
        return (
            f"Block({self._copy.block_id}, key={self._copy.key_bytes} B, value={self._copy.value_bytes} B, {self.tier})"
        )


class _Survivors:
    """Counts arrays that outlive their lease; the copy is released when the last one is collected."""

    __slots__ = ("_armed", "_copy", "_count", "_lender", "_number")

    def __init__(self, copy: Copy, lender: Lender, number: int) -> None:
        self._copy = copy
        self._lender = lender
        self._number = number
        self._count = 0
        self._armed = False

    def watch(self, array: npt.NDArray[np.uint8]) -> None:
        self._count += 1
        weakref.finalize(array, self._died).atexit = False

    def _died(self) -> None:
        self._count -= 1
        if self._armed and self._count == 0:
            self._lender.release_later(self._copy, self._number)

    def armed(self) -> None:
        """The lease's own references are gone: release now, or at the last death."""
        self._armed = True
        if self._count == 0:
            self._lender.release(self._copy, self._number)


def caller_of_package() -> str:
    """``file:line`` of the nearest frame outside this package and asyncio: where a lease was taken."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PASSED_BY):
        frame = frame.f_back
    return "a task of its own" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class GetRequest:
    """What ``store.get`` returns: ``await`` it for a lease, or ``async with`` it for a scoped one."""

    __slots__ = ("_block", "_getter", "_name")

    def __init__(self, getter: Getter, name: BlockId | PrefixKey | str) -> None:
        self._getter = getter
        self._name = name
        self._block: Block | None = None

    def __await__(self) -> Generator[Any, None, Block]:
        block = self._getter.try_hot(self._name)
        if block is None:
            block = yield from self._getter.load(self._name).__await__()
        return block

    async def __aenter__(self) -> Block:
        block = self._getter.try_hot(self._name)
        if block is None:
            block = await self._getter.load(self._name)
        self._block = block
        return block

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if block is not None and not block.released:
            block.release()
