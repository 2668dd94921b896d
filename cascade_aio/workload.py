"""Reproducible work for the store: requests that share prefixes, and block bytes made from an id.

Two sources of requests, both seeded or given, never random: multi-turn sessions that share system
prompts (``session_requests``), and a recorded trace (``trace_requests``). A request names its whole
prompt as a chain of ``PrefixKey``s; because a name covers everything before it, the blocks nobody
has asked for yet are always a suffix of the chain.

Block bytes come from a 64-bit content id alone (``fill_block``), so a reader can check every byte
without keeping a copy (``verify_block``). They are finite float16 values that no compressor or
deduplicator can shrink much, made faster than any disk reads them.

Pure apart from reading the trace file; knows neither store nor event loop.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from cascade_aio.errors import ConfigError
from cascade_aio.model import Namespace, PrefixKey, as_bytes_view, prefix_keys

if TYPE_CHECKING:
    from typing_extensions import Buffer

Words = npt.NDArray[np.uint64]

TRACE_BLOCK_TOKENS = 512
"""Tokens that one hash id of a trace stands for."""
TRACE_LINE_BYTES_MAX = 16 << 20
"""A longer line is no request (a million tokens are 2,000 hash ids)."""
SESSION_TOKENS_MAX = 1 << 22
"""Longest prompt that ``session_requests`` makes."""

_CHUNK_BYTES = 256 << 10
"""Bytes made from one position of the pool: long enough that NumPy's overhead vanishes, short enough for L2."""
_POOL_BYTES = 4 << 20
_WORD_BYTES = 8
_U64 = (1 << 64) - 1
_LANES = 0x0001_0001_0001_0001
_RANDOM_BITS = 0x9FFF * _LANES
"""Sign, low three exponent bits and mantissa of four float16; the exponent becomes 01xxx, never Inf or NaN."""
_EXPONENT_BITS = 0x2000 * _LANES


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a model's KV cache; key and value are of equal size."""

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2

    @property
    def token_bytes(self) -> int:
        """Bytes of key and value together, per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    def shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Key and value of one block as one array: (2, layers, tokens, KV heads, head dimension)."""
        return (2, self.layers, tokens, self.kv_heads, self.head_dim)


LLAMA_70B = Geometry(layers=80, kv_heads=8, head_dim=128)
"""80 layers x 8 KV heads x 128 x float16 x (K and V) = 320 KiB per token (DESIGN section 1)."""


def block_bytes(tokens: int, geometry: Geometry = LLAMA_70B) -> int:
    """Bytes of a block of ``tokens`` tokens, key and value together (256 tokens: 80 MiB)."""
    return tokens * geometry.token_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One prompt: the names of its full blocks in order, and from which of them on nobody asked before.

    The parent of ``keys[i]`` is ``keys[i - 1]``. ``output_tokens`` is how long the answer is.
    """

    timestamp_s: float
    session: int
    turn: int
    keys: tuple[PrefixKey, ...]
    new_from: int
    output_tokens: int = 0

    @property
    def new_keys(self) -> tuple[PrefixKey, ...]:
        return self.keys[self.new_from :]

    def parent(self, position: int) -> PrefixKey | None:
        """The key before ``position``, ``None`` for the first."""
        return self.keys[position - 1] if position else None


def content_id(key: PrefixKey) -> int:
    """The 64-bit id from which the bytes of the block named ``key`` are made."""
    return int.from_bytes(key[:8], "little")


@dataclasses.dataclass(frozen=True, slots=True)
class SessionPlan:
    """Parameters of ``session_requests``. Raises ``ConfigError`` for numbers that make no workload."""

    sessions: int = 8
    system_prompts: int = 2
    """Sessions choose one of these shared beginnings, popular ones more often (Zipf)."""
    turns: int = 3
    system_blocks: int = 4
    """Length of a system prompt in blocks."""
    turn_blocks: int = 1
    """Blocks by which a prompt grows per turn: question and previous answer together."""
    block_tokens: int = 256
    zipf_exponent: float = 1.0
    """The n-th system prompt is chosen with weight n ** -zipf_exponent; 0: all alike."""
    session_gap_s: float = 1.0
    """Mean time between starts of sessions (exponential)."""
    think_s: float = 4.0
    """Mean time between turns of a session (exponential)."""
    namespace: str | Namespace = "llama-70b/fp16/tp0"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sessions", "system_prompts", "turns", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("system_blocks", "turn_blocks", "zipf_exponent", "session_gap_s", "think_s", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.blocks_per_prompt_max * self.block_tokens > SESSION_TOKENS_MAX:
            raise ConfigError(
                f"prompts of {self.blocks_per_prompt_max * self.block_tokens} tokens exceed {SESSION_TOKENS_MAX}; "
                "lower system_blocks, turns or turn_blocks"
            )

    @property
    def blocks_per_prompt_max(self) -> int:
        return self.system_blocks + self.turns * self.turn_blocks


def session_requests(plan: SessionPlan) -> Iterator[Request]:
    """Requests of all sessions in order of time; the same plan gives the same requests.

    Turn ``t`` of a session asks for its system prompt and ``t + 1`` turns of its own text, so each
    turn repeats the one before and adds ``turn_blocks`` blocks.
    """
    chooser = np.random.default_rng([plan.seed, 0])
    weights = np.arange(1, plan.system_prompts + 1, dtype=np.float64) ** -plan.zipf_exponent
    choices = chooser.choice(plan.system_prompts, size=plan.sessions, p=weights / weights.sum())
    starts = np.cumsum(chooser.exponential(plan.session_gap_s, size=plan.sessions))
    queue = [(float(start), session, 0) for session, start in enumerate(starts)]
    heapq.heapify(queue)
    prompts: dict[int, tuple[list[PrefixKey], Iterator[float]]] = {}
    seen: set[PrefixKey] = set()
    while queue:
        timestamp_s, session, turn = heapq.heappop(queue)
        if session not in prompts:
            prompts[session] = _session_prompt(plan, session, int(choices[session]))
        chain, pauses_s = prompts[session]
        keys = tuple(chain[: plan.system_blocks + (turn + 1) * plan.turn_blocks])
        yield Request(timestamp_s, session, turn, keys, _count_seen(keys, seen), plan.turn_blocks * plan.block_tokens)
        seen.update(keys)
        if turn + 1 < plan.turns:
            heapq.heappush(queue, (timestamp_s + next(pauses_s), session, turn + 1))
        else:
            del prompts[session]


def _session_prompt(plan: SessionPlan, session: int, system_prompt: int) -> tuple[list[PrefixKey], Iterator[float]]:
    """All names that a session will ever ask for, and its pauses; independent of the other sessions."""
    shared = np.random.default_rng([plan.seed, 1, system_prompt])
    own = np.random.default_rng([plan.seed, 2, session])
    tokens = np.concatenate(
        [
            shared.integers(0, 128_000, size=plan.system_blocks * plan.block_tokens, dtype=np.uint32),
            own.integers(0, 128_000, size=plan.turns * plan.turn_blocks * plan.block_tokens, dtype=np.uint32),
        ]
    )
    pauses_s = own.exponential(plan.think_s, size=plan.turns)
    return prefix_keys(tokens, plan.block_tokens, plan.namespace), map(float, pauses_s)


def _count_seen(keys: Sequence[PrefixKey], seen: set[PrefixKey]) -> int:
    return next((position for position, key in enumerate(keys) if key not in seen), len(keys))


class _TraceLine(msgspec.Struct, frozen=True):
    """One line of a request trace; more fields are allowed and ignored."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def trace_requests(
    path: str | os.PathLike[str], *, limit: int | None = None, namespace: str | Namespace = "trace"
) -> Iterator[Request]:
    """Requests of a trace: JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``.

    A hash id stands for 512 tokens *and all that precede them*; the last one may be partly filled.
    At most ``limit`` requests. Raises ``ConfigError`` naming file and line for a line that is not
    one, and for a file that cannot be read. Blocks while it reads.
    """
    decoder = msgspec.json.Decoder(_TraceLine)
    seen: set[PrefixKey] = set()
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            count = 0
            for number in itertools.count(1):
                if limit is not None and count >= limit:
                    return
                line = file.readline(TRACE_LINE_BYTES_MAX + 1)
                if not line:
                    return
                if line.isspace():
                    continue
                request = _parse_trace_line(decoder, line, f"{name}, line {number}", count, namespace, seen)
                seen.update(request.keys)
                count += 1
                yield request
    except OSError as error:
        raise ConfigError(f"trace {name}: {error.strerror}; check the path and its mode") from None


def _parse_trace_line(
    decoder: msgspec.json.Decoder[_TraceLine],
    line: bytes,
    where: str,
    session: int,
    namespace: str | Namespace,
    seen: set[PrefixKey],
) -> Request:
    if len(line) > TRACE_LINE_BYTES_MAX:
        raise ConfigError(f"{where}: longer than {TRACE_LINE_BYTES_MAX} bytes; is it one JSON object per line?")
    try:
        fields = decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a request ({error})") from None
    if fields.timestamp < 0 or fields.input_length < 0 or fields.output_length < 0:
        raise ConfigError(f"{where}: timestamp, input_length and output_length must not be negative")
    tokens = fields.input_length + fields.output_length
    if len(fields.hash_ids) > -(-tokens // TRACE_BLOCK_TOKENS):
        raise ConfigError(f"{where}: {len(fields.hash_ids)} hash_ids of {TRACE_BLOCK_TOKENS} for {tokens} tokens")
    if any(not 0 <= hash_id <= _U64 for hash_id in fields.hash_ids):
        raise ConfigError(f"{where}: hash_ids must be between 0 and 2**64 - 1")
    halves = np.asarray(fields.hash_ids, dtype="<u8").view("<u4")
    keys = tuple(prefix_keys(halves, block_tokens=2, namespace=namespace))
    return Request(fields.timestamp / 1000, session, 0, keys, _count_seen(keys, seen), fields.output_length)


@functools.cache
def _pool() -> Words:
    """Random float16 in 64-bit words; raw generator output, which NumPy keeps stable between versions."""
    raw = np.random.PCG64(0xCA5CADE).random_raw((_POOL_BYTES + _CHUNK_BYTES) // _WORD_BYTES)
    pool: Words = (raw & np.uint64(_RANDOM_BITS)) | np.uint64(_EXPONENT_BITS)
    pool.flags.writeable = False
    return pool


def _mix(number: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): all bits of the input reach all of the output."""
    number = (number + 0x9E3779B97F4A7C15) & _U64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _U64
    return number ^ (number >> 31)


def _fill_chunk(seed: int, chunk: int, out: Words) -> None:
    """Chunk ``chunk`` of the stream ``seed``: a window of the pool under a 64-bit mask."""
    start = _mix(seed ^ _mix(chunk))
    window = start % (_POOL_BYTES // _WORD_BYTES)
    np.bitwise_xor(_pool()[window : window + len(out)], np.uint64(_mix(start) & _RANDOM_BITS), out=out)


def _part_seed(block: int, part: int) -> int:
    if not 0 <= block <= _U64:
        raise ConfigError(f"content id {block} must be between 0 and 2**64 - 1")
    return _mix(_mix(block) ^ part)


def fill_block(block: int, key_out: Buffer, value_out: Buffer) -> None:
    """Fill both buffers with the bytes of content id ``block`` (0 … 2**64 - 1).

    The bytes are little-endian float16 of magnitude 2**-7 … 2, never NaN or infinite; a longer part
    begins with the bytes of a shorter one. Buffers are contiguous and writable (``ConfigError``),
    any length, any alignment. Blocks for about 0.1 ms per MiB, mostly without the GIL.
    """
    for part, (name, out) in enumerate((("key_out", key_out), ("value_out", value_out))):
        view = as_bytes_view(out, name)
        if view.readonly and len(view):
            raise ConfigError(f"{name} is read-only; pass a writable buffer")
        _fill_part(_part_seed(block, part), np.frombuffer(view, dtype=np.uint8) if len(view) else None)


def _fill_part(seed: int, out: npt.NDArray[np.uint8] | None) -> None:
    if out is None:
        return
    for chunk, start in enumerate(range(0, len(out), _CHUNK_BYTES)):
        piece = out[start : start + _CHUNK_BYTES]
        whole = len(piece) // _WORD_BYTES * _WORD_BYTES
        if whole == len(piece):
            _fill_chunk(seed, chunk, piece.view(np.uint64))
        else:
            piece[:] = _make_bytes(seed, chunk, len(piece))


def _make_bytes(seed: int, chunk: int, nbytes: int) -> npt.NDArray[np.uint8]:
    words = np.empty(-(-nbytes // _WORD_BYTES), dtype=np.uint64)
    _fill_chunk(seed, chunk, words)
    return words.view(np.uint8)[:nbytes]


def verify_block(block: int, key: Buffer, value: Buffer) -> int:
    """Offset in ``key ‖ value`` of the first byte that ``fill_block`` would not have written, or -1.

    Blocks for about 0.2 ms per MiB, mostly without the GIL.
    """
    base = 0
    for part, (name, buffer) in enumerate((("key", key), ("value", value))):
        view = as_bytes_view(buffer, name)
        seed = _part_seed(block, part)
        for chunk, start in enumerate(range(0, len(view), _CHUNK_BYTES)):
            found = np.frombuffer(view[start : start + _CHUNK_BYTES], dtype=np.uint8)
            expected = _make_bytes(seed, chunk, len(found))
            if not _equal(expected, found):
                return base + start + int(np.flatnonzero(expected != found)[0])
        base += len(view)
    return -1


def _equal(expected: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8]) -> bool:
    """Whole words where the length allows: eight times fewer comparisons."""
    if len(found) % _WORD_BYTES == 0:
        return np.array_equal(expected.view(np.uint64), found.view(np.uint64))
    return np.array_equal(expected, found)
