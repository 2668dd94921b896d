"""The command line ``cascade-aio``. Modules: one per command, ``options`` and ``output`` shared.

Errors of the package and of the kernel are printed as one line on stderr: exit code 1, or 2 when the
call itself was wrong; Ctrl-C is 130. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cascade_aio.errors import CascadeError, InternalError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (``sys.argv`` without ``arguments``); always ends in ``SystemExit``."""
    try:
        _run(arguments)
    except KeyboardInterrupt:  # before or after the command's own handlers: during imports, mostly
        sys.exit(130)
    sys.exit(0)


def _run(arguments: Sequence[str] | None) -> None:
    from cascade_aio.cli.app import app  # typer and rich are slow to import
    from cascade_aio.cli.output import print_error

    try:
        app(args=None if arguments is None else list(arguments), prog_name="cascade-aio")
    except* InternalError:
        raise
    except* (CascadeError, OSError) as group:
        for error in print_error(group):
            sys.exit(2 if getattr(error, "is_usage", False) else 1)
