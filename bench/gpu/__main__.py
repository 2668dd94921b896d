"""``python -m bench.gpu --out FILE``: every figure of the GPU tier on device 0, each kept as soon as it is there.

Several minutes on a machine of its own. ``--fake`` runs the same code on the fake device with tiny blocks: for tests.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import sys
import tempfile
import traceback

from bench import machine
from bench.gpu.figures import FIGURES
from bench.gpu.rig import Rig
from bench.gpu.rows import GpuResult, NotRun, Row
from bench.results import CannotRunError, now_text
from cascade_aio.abc.device import DeviceDriver
from cascade_aio.errors import ConfigError
from cascade_aio.testing.gpu import FakeGpu
from cascade_aio.tiers.gpu.cuda import open_device


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="result file (JSON)")
    parser.add_argument("--dir", type=pathlib.Path, help="folder for segment files; default: a temporary one")
    parser.add_argument("--figures", default=",".join(FIGURES), help="of " + ", ".join(FIGURES))
    parser.add_argument("--fake", action="store_true", help="the fake device and tiny blocks; numbers mean nothing")
    options = parser.parse_args(arguments)
    names = options.figures.split(",")
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"there is no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    try:
        driver: DeviceDriver = FakeGpu(memory_bytes=1 << 30) if options.fake else open_device(0)
    except ConfigError as error:
        print(f"not run: {error}", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-gpu-") as folder:
        result = asyncio.run(_run(driver, pathlib.Path(folder), names, options.out, quick=options.fake))
    driver.close()
    return 0 if all(row.met for row in result.rows) and not result.not_run else 1


async def _run(
    driver: DeviceDriver, folder: pathlib.Path, names: list[str], out: pathlib.Path, *, quick: bool
) -> GpuResult:
    rig = Rig(driver, folder, quick=quick)
    result = GpuResult(machine.describe(folder), driver.description, "", now_text())
    for name in names:
        try:
            rows = await FIGURES[name](rig)
        except CannotRunError as error:
            result.not_run.append(NotRun(name, str(error)))
            print(f"{name}: not run: {error}", flush=True)
        except Exception as error:
            # A machine with a GPU is lent for minutes: one broken figure must not cost the others.
            traceback.print_exc()
            result.not_run.append(NotRun(name, f"failed: {error!r}"))
        else:
            result.rows += rows
            for row in rows:
                print(_line(row), flush=True)
        result.registration = rig.registration
        result.save(out)
    return result


def _line(row: Row) -> str:
    sides = ", ".join(f"{side} {spread.median:.2f} {row.unit}" for side, spread in row.spreads.items())
    sign = "≥" if row.at_least else "≤"
    verdict = "met" if row.met else "MISSED"
    size = f" {row.block_bytes >> 10} KiB" if row.block_bytes else ""
    return f"{row.figure}{size}: {row.achieved:.3f} ({sign} {row.target:g}, {verdict}); {sides}; {row.notes}"


if __name__ == "__main__":
    sys.exit(main())
