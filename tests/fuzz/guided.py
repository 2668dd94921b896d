"""One target under atheris, which looks for inputs that reach new lines: ``python -m tests.fuzz.guided footer 60 0``.

libFuzzer ends its process, with 0 if every input kept the promise.
"""

from __future__ import annotations

import logging
import sys

import atheris

INPUT_BYTES_MAX = 1000

with atheris.instrument_imports(
    include=["cascade_aio.segments", "cascade_aio.store.block", "cascade_aio.store.recovering"]
):
    from tests.fuzz.targets import TARGETS


def main(name: str, seconds: float, seed: int) -> None:
    """Never returns."""
    logging.disable(logging.WARNING)
    limits = [f"-max_total_time={max(1, round(seconds))}", f"-max_len={INPUT_BYTES_MAX}", f"-seed={seed + 1}"]
    atheris.Setup([sys.argv[0], *limits, "-timeout=20", "-rss_limit_mb=2048"], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
