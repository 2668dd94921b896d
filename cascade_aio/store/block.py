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
from collections.abc import AsyncIterator, Generator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self

import msgspec
import numpy as np
import numpy.typing as npt
from typing_extensions import TypeVar

from cascade_aio.errors import ConfigError, LeaseError
from cascade_aio.model import BlockId, BlockMeta, PrefixKey, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

_PARTS_STEP = 64
"""Arrays given by ``ready`` between two looks at which of them still live."""

_PASSED_BY = (__name__.partition(".")[0] + ".", "asyncio.")
"""Modules that are never the place where a lease was taken."""

Readiness = Literal["whole", "first-bytes"]
Part = Literal["key", "value"]

_meta_decoder = msgspec.msgpack.Decoder(BlockMeta)


def encode_meta(meta: BlockMeta) -> bytes:
    """The bytes of ``meta`` in a record header. Raises ``ConfigError`` for fields that could not be read back."""
    try:
        raw = msgspec.msgpack.encode(meta)
        _meta_decoder.decode(raw)
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"meta={meta!r:.200} cannot be stored ({error}); give its fields the types that BlockMeta names"
        ) from None
    return raw


def decode_meta(raw: bytes) -> BlockMeta:
    """What ``encode_meta`` was given. Raises ``ConfigError`` for bytes that it never made."""
    try:
        return _meta_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"meta of {len(raw)} bytes is no BlockMeta: {error}") from None


def is_early(ready: Readiness) -> bool:
    """Whether ``ready`` asks for a lease before all bytes are there. Raises ``ConfigError`` for another word."""
    if ready not in ("whole", "first-bytes"):
        raise ConfigError(f"ready={ready!r} is unknown; use 'whole' or 'first-bytes'")
    return ready == "first-bytes"


class Arriving(Protocol):
    """What is there of a copy that is still being read."""

    @property
    def complete(self) -> bool: ...

    async def wait(self, start: int, stop: int) -> None:
        """Return once the payload's bytes ``start`` up to ``stop`` are verified. Raises what the read failed with."""
        ...


class LeasedCopy(Protocol):
    """What a lease needs of its copy: one in this process's catalog, or one that a service keeps."""

    @property
    def arrival(self) -> Arriving | None: ...
    @property
    def block_id(self) -> BlockId: ...
    @property
    def key_bytes(self) -> int: ...
    @property
    def value_bytes(self) -> int: ...
    @property
    def value_offset(self) -> int: ...
    @property
    def meta(self) -> bytes: ...
    def key_view(self) -> memoryview: ...
    def value_view(self) -> memoryview: ...


class Lease(Protocol):
    """What the request objects need of a lease."""

    @property
    def released(self) -> bool: ...
    def release(self) -> None: ...


LeaseT = TypeVar("LeaseT", bound=Lease, default="Block")
"""A lease on a copy in the arena, if nothing else is said."""


class BlockSource(Protocol[LeaseT]):
    """Who gives leases for the request objects."""

    def try_hot(self, name: BlockId | PrefixKey | str) -> LeaseT | None: ...
    async def load(self, name: BlockId | PrefixKey | str, *, early: bool = False) -> LeaseT: ...
    async def load_prefix(self, keys: Sequence[PrefixKey]) -> list[LeaseT]: ...


class Lender(Protocol):
    """Who takes leases back; ``copy`` is the one it lent."""

    def release(self, copy: Any, number: int) -> None:
        """On the loop's thread, from ordinary code."""
        ...

    def release_later(self, copy: Any, number: int) -> None:
        """From any thread and from finalizers, which may run in the middle of anything."""
        ...


class Block:
    """A leased block. Created by ``store.get``; release it with ``release()`` or ``with block:``."""

    __slots__ = (
        "__weakref__",
        "_copy",
        "_key",
        "_lender",
        "_number",
        "_parts",
        "_value",
        "_views",
        "_where",
        "tier",
    )

    def __init__(self, copy: LeasedCopy, tier: Tier, lender: Lender, number: int, where: str) -> None:
        self._copy: LeasedCopy | None = copy
        self._lender = lender
        self._number = number
        self._key: npt.NDArray[np.uint8] | None = None
        self._value: npt.NDArray[np.uint8] | None = None
        self._views: list[memoryview] | None = None
        self._parts: list[weakref.ref[npt.NDArray[np.uint8]]] = []  # given by ``ready``, where they still live
        self._where = where
        self.tier = tier
        """Where the block was found when it was asked for."""

    def _leased(self) -> LeasedCopy:
        if self._copy is None:
            raise LeaseError(f"this lease was released already (taken at {self._where}); get the block again")
        return self._copy

    def _whole(self) -> LeasedCopy:
        copy = self._leased()
        if copy.arrival is not None and not copy.arrival.complete:
            raise LeaseError(
                f"block {copy.block_id} is still being read (it was got with ready='first-bytes'); "
                "await block.ready(...) for the bytes you need, or block.ready() for all of them"
            )
        return copy

    @property
    def leased_copy(self) -> LeasedCopy:
        """The copy in the arena, for the store's own parts: an embedded store's is a ``store.catalog.Copy``."""
        return self._leased()

    @property
    def block_id(self) -> BlockId:
        return self._leased().block_id

    @property
    def key(self) -> npt.NDArray[np.uint8]:
        """The key part: read-only uint8 array of shape (key_bytes,), in the arena, no copy (DLPack works)."""
        if self._key is None:
            self._key = self._view(self._whole().key_view())
        return self._key

    @property
    def value(self) -> npt.NDArray[np.uint8]:
        """The value part, like ``key``; its address is 64-byte aligned."""
        if self._value is None:
            self._value = self._view(self._whole().value_view())
        return self._value

    def views(self) -> tuple[memoryview, memoryview]:
        """Key and value as read-only memoryviews. Unlike the arrays they do not keep the memory pinned:
        they must not be used after ``release``."""
        copy = self._whole()
        return copy.key_view(), copy.value_view()

    @property
    def complete(self) -> bool:
        """Whether all bytes are there and verified; always so but for ``ready="first-bytes"``."""
        arrival = self._leased().arrival
        return arrival is None or arrival.complete

    async def ready(
        self, part: Part | None = None, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.uint8] | None:
        """Wait for bytes ``start`` up to ``stop`` (default: the end) of the key or the value, and give them.

        The array is read-only, of shape (stop - start,), in the arena, no copy, every byte verified. Without
        a ``part``: wait for the whole block, give nothing. Does not suspend for what is there. Raises
        ``ConfigError`` (a range outside the part), and what the reading of the rest failed with, as ``get``
        does. May be cancelled.
        """
        copy = self._leased()
        if part is None:
            await _arrived(copy, 0, copy.value_offset + copy.value_bytes)
            return None
        if part not in ("key", "value"):
            raise ConfigError(f"part={part!r} is unknown; use 'key' or 'value'")
        size, base = (copy.key_bytes, 0) if part == "key" else (copy.value_bytes, copy.value_offset)
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise ConfigError(f"bytes {start} to {stop} are outside the {part}, which has {size}")
        await _arrived(copy, base + start, base + stop)
        self._leased()  # it may have been released meanwhile
        view = (copy.key_view() if part == "key" else copy.value_view())[start:stop]
        array = self._view(view)
        if len(self._parts) % _PARTS_STEP == 0:
            self._parts = [ref for ref in self._parts if ref() is not None]
            self._views = [view]  # arrays keep their own views alive
        self._parts.append(weakref.ref(array))
        return array

    async def layers(self, count: int) -> AsyncIterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """Key and value of each of ``count`` equal layers, in order, each as soon as it has arrived.

        Both parts must be a multiple of ``count`` bytes: else ``ConfigError``. Errors as ``ready``.
        """
        copy = self._leased()
        key_bytes, value_bytes = layer_sizes(copy.key_bytes, copy.value_bytes, count)
        for layer in range(count):
            key = await self.ready("key", layer * key_bytes, (layer + 1) * key_bytes)
            value = await self.ready("value", layer * value_bytes, (layer + 1) * value_bytes)
            assert key is not None
            assert value is not None
            yield key, value

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

    def _release_views(self, copy: LeasedCopy, *, late: bool = False) -> None:
        """Release now if nobody else refers to the arrays, else when the last dies. ``late``: by a finalizer."""
        arrays, views = [self._key, self._value, *(part() for part in self._parts)], self._views
        self._key = self._value = self._views = None
        self._parts = []
        assert views is not None
        survivors = Survivors(copy, self._lender, self._number)
        for array in arrays:
            if array is not None:
                survivors.watch(array)
        del array, arrays
        del views
        survivors.armed(late=late)

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
            if self._views is None:
                self._lender.release_later(copy, self._number)
            else:  # ``value = (await store.get(name)).value``: the array keeps its bytes, as after ``release``
                self._release_views(copy, late=True)

    def __repr__(self) -> str:
        if self._copy is None:
            return "Block(released)"
        return (
            f"Block({self._copy.block_id}, key={self._copy.key_bytes} B, value={self._copy.value_bytes} B, {self.tier})"
        )


def layer_sizes(key_bytes: int, value_bytes: int, count: int) -> tuple[int, int]:
    """Bytes of key and of value in one of ``count`` equal layers. Raises ``ConfigError`` if there is no such number."""
    if count < 1 or key_bytes % count or value_bytes % count:
        raise ConfigError(f"key and value of {key_bytes} and {value_bytes} bytes are not {count} equal layers")
    return key_bytes // count, value_bytes // count


async def _arrived(copy: LeasedCopy, start: int, stop: int) -> None:
    """Return once bytes ``start`` up to ``stop`` of the payload may be looked at."""
    if copy.arrival is not None:
        await copy.arrival.wait(start, stop)


class Survivors:
    """Counts arrays that outlive their lease; the copy is released when the last one is collected. Any objects that
    can be referred to weakly."""

    __slots__ = ("_armed", "_copy", "_count", "_lender", "_number")

    def __init__(self, copy: object, lender: Lender, number: int) -> None:
        self._copy = copy
        self._lender = lender
        self._number = number
        self._count = 0
        self._armed = False

    def watch(self, array: object) -> None:
        self._count += 1
        weakref.finalize(array, self._died).atexit = False

    def _died(self) -> None:
        self._count -= 1
        if self._armed and self._count == 0:
            self._lender.release_later(self._copy, self._number)

    def armed(self, *, late: bool = False) -> None:
        """The lease's own references are gone: release now (``late``: from a finalizer), or at the last death."""
        self._armed = True
        if self._count == 0:
            (self._lender.release_later if late else self._lender.release)(self._copy, self._number)


def caller_of_package() -> str:
    """``file:line`` of the nearest frame outside this package and asyncio: where a lease was taken."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PASSED_BY):
        frame = frame.f_back
    return "a task of its own" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class GetRequest(Generic[LeaseT]):
    """What ``store.get`` returns: ``await`` it for a lease, or ``async with`` it for a scoped one."""

    __slots__ = ("_block", "_early", "_getter", "_name")

    def __init__(self, getter: BlockSource[LeaseT], name: BlockId | PrefixKey | str, *, early: bool = False) -> None:
        self._getter = getter
        self._name = name
        self._early = early
        self._block: LeaseT | None = None

    def __await__(self) -> Generator[Any, None, LeaseT]:
        block = self._getter.try_hot(self._name)
        if block is None:
            block = yield from self._getter.load(self._name, early=self._early).__await__()
        return block

    async def __aenter__(self) -> LeaseT:
        block = self._getter.try_hot(self._name)
        if block is None:
            block = await self._getter.load(self._name, early=self._early)
        self._block = block
        return block

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if block is not None and not block.released:
            block.release()
