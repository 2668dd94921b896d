"""Names and digests: fixed values, refusals, and the chain of prefix keys."""

import hashlib
import struct
from typing import Any

import blake3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.errors import ConfigError
from cascade_aio.model import (
    BlockId,
    BlockMeta,
    Namespace,
    PrefixKey,
    as_bytes_view,
    compute_block_id,
    compute_digest,
    prefix_keys,
    prefix_root,
)


def test_block_id_is_the_first_half_of_sha256() -> None:
    expected = hashlib.sha256(b"keyvalue").digest()
    assert compute_digest(b"key", b"value") == expected
    block_id = compute_block_id(b"key", b"value")
    assert block_id == expected[:16]
    assert str(block_id) == expected[:16].hex()
    assert len(str(block_id)) == 32
    assert compute_digest(b"key", b"value", "blake3") == blake3.blake3(b"keyvalue").digest()


@given(key=st.binary(max_size=50), value=st.binary(max_size=50))
def test_any_buffer_of_the_same_bytes_has_the_same_id(key: Any, value: Any) -> None:
    as_arrays = compute_block_id(np.frombuffer(key, np.uint8), bytearray(value))
    assert as_arrays == compute_block_id(key, memoryview(value)) == BlockId(hashlib.sha256(key + value).digest()[:16])


def test_names_parse_and_refuse() -> None:
    block_id = compute_block_id(b"", b"")
    assert BlockId.from_hex(str(block_id).upper()) == block_id
    assert hash(block_id) == hash(bytes(block_id))
    assert repr(block_id) == f"BlockId({block_id})"
    for text in ("", "12", "zz" * 16, "0" * 31, "0" * 33, " " * 32, "0x" + "0" * 30, str(block_id)[:-2] + " 0"):
        with pytest.raises(ConfigError, match="32 hex digits"):
            BlockId.from_hex(text)
    with pytest.raises(ConfigError, match="takes 32 bytes, not 16"):
        PrefixKey(bytes(16))


@pytest.mark.parametrize("buffer", [np.zeros((4, 4))[:, :2], np.zeros((2, 3)).T, memoryview(b"abcd")[::2]])
def test_non_contiguous_buffers_are_refused_with_a_cure(buffer: Any) -> None:
    with pytest.raises(ConfigError, match="ascontiguousarray"):
        as_bytes_view(buffer, "key")


def test_buffers_without_the_protocol_are_refused() -> None:
    for thing in ("text", 5, None, [1]):
        with pytest.raises(ConfigError, match="no buffer protocol"):
            as_bytes_view(thing, "value")  # type: ignore[arg-type]


def test_bytes_views_do_not_copy() -> None:
    array = np.zeros((3, 4), np.float16)
    view = as_bytes_view(array, "key")
    assert (view.nbytes, view.format) == (24, "B")
    view[0] = 1
    assert array.view(np.uint8)[0, 0] == 1
    assert len(as_bytes_view(np.zeros((0, 5)), "key")) == 0


def test_unknown_digest_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sha256, blake3"):
        compute_digest(b"", b"", "md5")


def test_prefix_keys_chain_from_the_root_of_their_namespace() -> None:
    keys = prefix_keys(range(7), block_tokens=3, namespace="m")
    first = hashlib.sha256(prefix_root("m") + struct.pack("<3I", 0, 1, 2)).digest()
    second = hashlib.sha256(first + struct.pack("<3I", 3, 4, 5)).digest()
    assert keys == [first, second]
    assert all(isinstance(key, PrefixKey) for key in keys)


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40), cut=st.integers(0, 10))
def test_a_chain_may_be_continued_from_any_block(tokens: Any, cut: Any) -> None:
    whole = prefix_keys(tokens, block_tokens=4)
    cut = min(cut, len(whole))
    head = prefix_keys(tokens[: 4 * cut], block_tokens=4)
    tail = prefix_keys(tokens[4 * cut :], block_tokens=4, parent=head[-1] if head else None)
    assert head + tail == whole
    assert prefix_keys(np.array(tokens, np.int64), block_tokens=4) == whole


def test_namespaces_never_share_names() -> None:
    spaces: list[str | bytes | Namespace] = [
        "m",
        b"n",
        "",
        Namespace("m"),
        Namespace("m", salt="a"),
        Namespace("m", revision="a"),
        Namespace("ma"),
    ]
    assert len({prefix_keys([1], 1, space)[0] for space in spaces}) == len(spaces)


@pytest.mark.parametrize("tokens", [[-1], [2**32], [1.5], [[1]], ["a"]])
def test_token_ids_that_are_none_are_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="token_ids"):
        prefix_keys(tokens, 1)


def test_block_tokens_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="block_tokens=0"):
        prefix_keys([1], 0)


def test_meta_is_a_frozen_value() -> None:
    assert BlockMeta(dtype="float16", shape=(2, 3)) == BlockMeta(dtype="float16", shape=(2, 3))
    with pytest.raises(AttributeError):
        BlockMeta().dtype = "x"  # type: ignore[misc]
