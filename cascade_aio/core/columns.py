"""Memory for columns that never move: reserved whole, paid for page by page.

An anonymous private mapping reads as zeros, and the kernel gives a page when it is first written.
Not ``numpy.zeros``: NumPy asks for huge pages, and the first touch of each 2 MiB then stops the event
loop for up to 6 ms (measured; 0.2 ms at most with 4 KiB pages, and less time in total). This is
memory and nothing else: no file, no sharing.
"""

from __future__ import annotations

import errno
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def reserve(count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A zeroed, writable array of ``count`` elements that holds memory only where it was written.

    The mapping goes away with the last view of the array. Raises ``OSError`` (ENOMEM) if the address
    space is limited below it.
    """
    kind = np.dtype(dtype)
    mapping = mmap.mmap(-1, max(1, count * kind.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: a kernel without huge pages, which is what we ask for
            raise
    return np.frombuffer(mapping, dtype=kind, count=count)
