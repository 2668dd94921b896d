"""Page-aligned memory for the few bytes that are not in an arena: headers, footers, scan windows."""

from __future__ import annotations

import mmap

from cascade_aio.abc.storage import PAGE_BYTES


def page_padded(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def page_buffer(nbytes: int) -> memoryview:
    """Zeroed, writable, page-aligned memory of ``nbytes`` rounded up to whole pages; freed with its last view."""
    return memoryview(mmap.mmap(-1, max(PAGE_BYTES, page_padded(nbytes))))
