"""Hit rate against capacity as a figure: one panel per trace, one line per policy. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade_aio.core.contest import OPTIMUM, OURS, REFERENCE, Score
from cascade_aio.errors import ConfigError

PANEL_INCHES = (5.0, 4.0)
DOTS_PER_INCH = 150

_STYLES = {OURS: ("C3", "-", 2.5), OPTIMUM: ("black", "--", 1.5), REFERENCE: ("C0", "-", 1.5)}


def draw(path: Path, scores: Sequence[Score]) -> None:
    """Write the figure of ``scores`` (at least one) to ``path``; the suffix chooses the format. Blocks.

    Raises ``ConfigError`` without matplotlib, for an unknown suffix, or if ``path`` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--figure needs matplotlib: pip install 'cascade_aio[bench]'") from None
    traces = list(dict.fromkeys(score.trace for score in scores))
    figure = Figure(figsize=(PANEL_INCHES[0] * len(traces), PANEL_INCHES[1]), layout="constrained")
    panels = figure.subplots(1, len(traces), squeeze=False)[0]
    for panel, name in zip(panels, traces, strict=True):
        for policy in dict.fromkeys(score.policy for score in scores):
            points = [score for score in scores if score.trace == name and score.policy == policy]
            color, line, width = _STYLES.get(policy, (None, "-", 0.8))
            panel.plot(
                [100 * score.share for score in points],
                [100 * score.count.block_hit_rate for score in points],
                color=color, linestyle=line, linewidth=width, marker=".", label=policy,
            )  # fmt: skip
        panel.set(title=name, xscale="log", xlabel="capacity, % of different blocks", ylabel="block hit rate, %")
        panel.grid(visible=True, alpha=0.3)
    panels[0].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except ValueError as error:
        raise ConfigError(f"--figure {path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"--figure {path}: {error.strerror}; check the path and its mode") from None
