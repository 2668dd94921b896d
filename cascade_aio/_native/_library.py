"""The door to the compiled module: nothing else imports it. Its types are in ``_cascade.pyi``."""

from __future__ import annotations

try:
    from cascade_aio._native import _cascade
except ImportError as error:
    raise ImportError(
        f"the compiled module cascade_aio._native._cascade cannot be loaded ({error}); build it: "
        "`make build` in a checkout, or `pip install .` (needs a C compiler and liburing-dev)"
    ) from error

ffi = _cascade.ffi
lib = _cascade.lib
