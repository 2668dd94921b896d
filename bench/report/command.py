"""``python -m bench report RESULT…``: Markdown, LaTeX and figures of result files, and the README's section."""

from __future__ import annotations

import os
import pathlib
from typing import Annotated

import typer
from rich.console import Console

from bench.machine import REPOSITORY
from bench.report import figures, latex, markdown, readme
from bench.report.parts import Part, load_parts
from bench.results import BenchError, CannotRunError

RESULTS = REPOSITORY / "bench" / "results"
PATTERN = "systems-*.json"
FIGURES = "figures"


def report(
    result: Annotated[
        list[pathlib.Path] | None, typer.Argument(help="Result files; default: all systems-*.json in bench/results.")
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="Folder for comparison.md, comparison.tex, figures/.")] = RESULTS,
    section: Annotated[pathlib.Path | None, typer.Option("--readme", help="File whose section is written too.")] = None,
    check: Annotated[bool, typer.Option(help="Change nothing; exit 1 if a file is not in step.")] = False,
    with_figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw; needs matplotlib.")] = True,
) -> None:
    """Write down what was measured in a comparison: Markdown, a LaTeX table, figures, the README's section."""
    console = Console(stderr=True)
    try:
        paths = result or sorted(RESULTS.glob(PATTERN))
        if not paths and section is None:
            raise BenchError(f"there is no {PATTERN} in bench/results: run `python -m bench run --systems …` first")
        parts = load_parts(paths)
        texts = _texts(parts, out, section)
        if with_figures and not check:
            for part in parts:
                figures.draw(part, out / FIGURES, _stem(part))
        for path, text in texts.items():
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
            elif not path.exists() or path.read_text(encoding="utf-8") != text:
                raise BenchError(
                    f"{path.name} is not in step with the result files: run `python -m bench report` again"
                )
    except CannotRunError as error:
        console.print(f"bench: {error}; or --no-figures", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except BenchError as error:
        console.print(f"bench: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from error


def _texts(parts: list[Part], out: pathlib.Path, section: pathlib.Path | None) -> dict[pathlib.Path, str]:
    """What each file has to hold."""
    found: dict[pathlib.Path, str] = {}
    if parts:
        found[out / "comparison.md"] = markdown.render(parts, _pictures(parts, FIGURES))
        found[out / "comparison.tex"] = latex.render(parts)
    if section is not None:
        if not section.exists():
            raise BenchError(f"there is no {section.name} to put the section into")
        folder = os.path.relpath(out / FIGURES, section.resolve().parent)
        text = readme.section(parts, _pictures(parts, folder))
        found[section] = readme.replace(section.read_text(encoding="utf-8"), text)
    return found


def _pictures(parts: list[Part], folder: str) -> list[list[tuple[str, str]]]:
    return [
        [(title, f"{folder}/{_stem(part)}-{name}.svg") for name, title in figures.names(part.result)] for part in parts
    ]


def _stem(part: Part) -> str:
    return pathlib.Path(part.names[0]).stem
