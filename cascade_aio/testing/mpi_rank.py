"""One rank of a job of ``testing.mpi``: calls the job's function and leaves its outcome as a file.

``python -m cascade_aio.testing.mpi_rank package.module:function JSON``, under a launcher. Knows its rank from the
launcher's environment, so that a rank whose MPI does not even initialise can still say why.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from cascade_aio.testing.mpi import OUTCOMES_VARIABLE, RANK_VARIABLES, SKIP_FINALIZE_VARIABLE


def main(target: str, arguments: str) -> None:
    """Run, write ``<rank>.json``, and end the process if MPI must not be finalised."""
    rank = rank_of_this_process()
    try:
        result = _call(target, json.loads(arguments))
        outcome = json.dumps({"result": result, "error": None})
    except BaseException:  # reported to the launcher, which shows it; the process ends with it
        _write(rank, json.dumps({"result": None, "error": traceback.format_exc()}))
        sys.stderr.flush()
        os._exit(1)  # no finalising: the others may be anywhere, and the launcher ends them
    _write(rank, outcome)
    if SKIP_FINALIZE_VARIABLE in os.environ:
        os._exit(0)


def rank_of_this_process() -> int:
    """As the launcher numbers it. Raises ``RuntimeError`` outside a launcher."""
    for variable in RANK_VARIABLES:
        if variable in os.environ:
            return int(os.environ[variable])
    raise RuntimeError(f"no launcher of MPI has started this process: none of {', '.join(RANK_VARIABLES)} is set")


def _call(target: str, arguments: dict[str, Any]) -> Any:
    module, _, name = target.partition(":")
    result = getattr(importlib.import_module(module), name)(**arguments)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _write(rank: int, outcome: str) -> None:
    """Whole or not at all: a rank may be killed at any time."""
    directory = Path(os.environ[OUTCOMES_VARIABLE])
    unfinished = directory / f"{rank}.unfinished"
    unfinished.write_text(outcome)
    unfinished.rename(directory / f"{rank}.json")


if __name__ == "__main__":
    main(*sys.argv[1:3])
