"""Request logs as traces for replay: block-hash traces and chat-completion logs, JSON lines both.

* a *hash trace* has ``timestamp``, ``input_length`` and ``hash_ids`` (one per 512 tokens, the last one
  may be partly filled);
* a *chat log* has ``messages``, each with ``role`` and ``content`` (a string, or parts of which the
  ``text`` is taken). Its blocks are runs of so many tokens of the rendered conversation. Without a
  tokenizer ``CHAT_TOKEN_BYTES`` bytes stand in for a token, which moves block bounds a little and shared
  prefixes not at all. Only full blocks count, as in the store.

Reads files; knows neither policies nor how reports look.
"""

from __future__ import annotations

import hashlib
import importlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cascade_aio.core.replay import ReplayTrace
from cascade_aio.errors import ConfigError
from cascade_aio.workload import LLAMA_70B, TRACE_BLOCK_TOKENS, TRACE_LINE_BYTES_MAX

CHAT_BLOCK_TOKENS = 256
CHAT_TOKEN_BYTES = 4
"""Bytes of text per token of usual tokenizers."""
Encode = Callable[[str], Sequence[int]]
"""A tokenizer: text to token ids."""


class _Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class _Line(msgspec.Struct):
    """Either kind of line; other fields are ignored."""

    hash_ids: list[int] | None = None
    input_length: int | None = None
    messages: list[_Message] | None = None


def load_tokenizer(path: Path) -> Encode:
    """The tokenizer of a ``tokenizer.json``. Raises ``ConfigError`` without the library, or for what is none."""
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        raise ConfigError("--tokenizer needs the tokenizers library: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare ``Exception``
        raise ConfigError(f"--tokenizer {path}: not a tokenizer.json ({error})") from None

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def read_trace(
    path: Path, *, limit: int | None = None, encode: Encode | None = None, block_tokens: int = CHAT_BLOCK_TOKENS
) -> ReplayTrace:
    """The requests of ``path`` in its order, at most ``limit``. Blocks while it reads.

    ``encode`` and ``block_tokens`` are for chat logs; a hash trace has its blocks already.

    Raises ``ConfigError`` naming file and line for one that is not a request, for a file without any,
    and for a file that cannot be read.
    """
    trace = ReplayTrace(path.name.removesuffix(".jsonl"), token_bytes=LLAMA_70B.token_bytes)
    decoder = msgspec.json.Decoder(_Line)
    try:
        with path.open("rb") as file:
            number = 0
            while (limit is None or len(trace.chains) < limit) and (line := file.readline(TRACE_LINE_BYTES_MAX + 1)):
                number += 1
                if not line.isspace():
                    _add_line(trace, decoder, line, f"{path}, line {number}", encode, block_tokens)
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}; check the path and its mode") from None
    if not trace.chains:
        raise ConfigError(
            f"trace {path} has no request with a full block (of {block_tokens} tokens in a chat log): is it empty, or "
            "are its prompts shorter?"
        )
    return trace


def _add_line(
    trace: ReplayTrace,
    decoder: msgspec.json.Decoder[_Line],
    line: bytes,
    where: str,
    encode: Encode | None,
    block_tokens: int,
) -> None:
    if len(line) > TRACE_LINE_BYTES_MAX:
        raise ConfigError(f"{where}: longer than {TRACE_LINE_BYTES_MAX} bytes; is it one JSON object per line?")
    try:
        fields = decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a request ({error})") from None
    if fields.hash_ids is not None:
        trace.add(fields.hash_ids, _block_tokens(len(fields.hash_ids), fields.input_length, where))
    elif fields.messages is not None:
        ids = chat_block_ids(fields.messages, encode, block_tokens)
        trace.add(ids, [block_tokens] * len(ids))
    else:
        raise ConfigError(f"{where}: has neither hash_ids nor messages")


def _block_tokens(blocks: int, input_tokens: int | None, where: str) -> list[int]:
    """Tokens per block: all full but the last, which has the rest of ``input_tokens``."""
    if input_tokens is None:
        return [TRACE_BLOCK_TOKENS] * blocks
    if input_tokens < 0:
        raise ConfigError(f"{where}: input_length must not be negative")
    rest = input_tokens - (blocks - 1) * TRACE_BLOCK_TOKENS
    return [TRACE_BLOCK_TOKENS] * (blocks - 1) + [min(max(rest, 1), TRACE_BLOCK_TOKENS)] if blocks else []


def chat_block_ids(messages: list[_Message], encode: Encode | None, block_tokens: int) -> list[int]:
    """64-bit ids of the full blocks of a conversation, by their tokens, or by their bytes without ``encode``."""
    text = "".join(f"<|{message.role}|>{_text(message.content)}" for message in messages)
    if encode is None:
        raw, block_bytes = text.encode(), block_tokens * CHAT_TOKEN_BYTES
    else:
        tokens = array("Q", encode(text))
        raw, block_bytes = tokens.tobytes(), block_tokens * tokens.itemsize
    blocks = range(0, len(raw) - block_bytes + 1, block_bytes)
    return [
        int.from_bytes(hashlib.blake2b(raw[start : start + block_bytes], digest_size=8).digest(), "little")
        for start in blocks
    ]


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part.get("text", "")) for part in content)
