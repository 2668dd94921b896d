"""The README's section of the comparison, between two marker comments: made from result files, never by hand. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markdown import Figures, brief_lines
from bench.report.parts import Part
from bench.results import BenchError

BEGIN = "<!-- systems:begin -->"
END = "<!-- systems:end -->"
NOTHING = "No result set of a comparison is committed yet: nothing is claimed."


def section(parts: Sequence[Part], figures: Sequence[Figures]) -> str:
    """What stands between the markers."""
    if not parts:
        return NOTHING
    lines: list[str] = []
    for part, pictures in zip(parts, figures, strict=True):
        lines += [*brief_lines(part), ""]
        for title, path in pictures:
            lines += [f"![{title}]({path})", ""]
    return "\n".join(lines).rstrip()


def replace(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers. Raises ``BenchError`` without them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"the README has no {BEGIN} … {END}: put the two lines where the section belongs")
    return f"{before}{begin}\n{text}\n{end}{after}"
