"""Write the C source of ``cascade_aio._native._cascade`` from the declarations in ``c/cascade.h``.

CMake runs it: ``python build.py HEADER OUTPUT``. The header is the single source of the interface:
the text between its ``cffi: begin`` and ``cffi: end`` markers, without comments, is what cffi
parses, and the generated module includes the same header, so the C compiler checks every signature
and every struct layout that Python will use. It knows nothing of what the functions do.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cffi

MODULE = "cascade_aio._native._cascade"
BEGIN_MARKER = "/* cffi: begin */"
END_MARKER = "/* cffi: end */"

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def declarations(header_text: str) -> str:
    """The C declarations between the markers, comments stripped. Raises ``ValueError`` without markers."""
    _, begin, rest = header_text.partition(BEGIN_MARKER)
    body, end, _ = rest.partition(END_MARKER)
    if not (begin and end):
        raise ValueError(f"the header lacks {BEGIN_MARKER!r} or {END_MARKER!r}")
    return _COMMENT.sub("", body)


def write_source(header: Path, output: Path) -> None:
    """Generate ``output`` (C) for the interface in ``header``; leaves an identical file untouched."""
    ffi = cffi.FFI()
    ffi.cdef(declarations(header.read_text(encoding="utf-8")))
    ffi.set_source(MODULE, f'#include "{header.name}"', py_limited_api=True)
    ffi.emit_c_code(str(output))


def main(arguments: list[str]) -> int:
    """Command line: HEADER OUTPUT. Returns the exit status."""
    if len(arguments) != 2:
        sys.stderr.write("usage: build.py HEADER OUTPUT\n")
        return 2
    write_source(Path(arguments[0]), Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
