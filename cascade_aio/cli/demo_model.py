"""``demo --model``: a language model answers prompts from KV that another process of it kept, with the same tokens.

Each half runs in a process of its own (``cascade_aio.integrations._model_demo``): a restart is what it shows. Knows
neither torch nor how KV is stored.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile

import msgspec
from rich.table import Table

from cascade_aio.cli.demo_phases import drop_segments
from cascade_aio.cli.output import UsageError, out
from cascade_aio.errors import CascadeError

PROMPT_TOKENS = (512, 2048, 8192)
PROMPT_TOKENS_SMALL = (512,)
PHASE_SECONDS_MAX = 600


class Answer(msgspec.Struct):
    """What one prompt gave: tokens loaded, seconds to the first token, all new tokens."""

    loaded: int
    first_token_s: float
    tokens: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelRow:
    """One prompt, computed and loaded."""

    prompt_tokens: int
    loaded_tokens: int
    computed_first_token_s: float
    loaded_first_token_s: float
    same_tokens: bool


def play(root: str, lengths: tuple[int, ...]) -> list[ModelRow]:
    """Both halves, in a directory of their own below ``root``, which is removed.

    Raises ``UsageError`` where torch or transformers are missing, ``CascadeError`` for a half that failed.
    """
    made_root = not os.path.isdir(root)
    os.makedirs(root, exist_ok=True)
    try:
        computed, loaded = _halves(root, lengths)
    finally:
        if made_root:
            os.rmdir(root)
    return [
        ModelRow(tokens, new.loaded, old.first_token_s, new.first_token_s, old.tokens == new.tokens)
        for tokens, old, new in zip(lengths, computed, loaded, strict=True)
    ]


def _halves(root: str, lengths: tuple[int, ...]) -> tuple[list[Answer], list[Answer]]:
    with tempfile.TemporaryDirectory(prefix="cascade-demo-", dir=root) as directory:
        place = os.path.join(directory, "root")
        computed = _half("save", place, lengths)
        drop_segments(place)
        return computed, _half("load", place, lengths)


def print_rows(rows: list[ModelRow]) -> None:
    table = Table(title="A random Llama of 8 layers; KV loaded by a new process, cold files")
    for head in ("prompt", "loaded", "first token, computed", "first token, loaded", "ratio", "tokens"):
        table.add_column(head, justify="right")
    for row in rows:
        ratio = row.computed_first_token_s / row.loaded_first_token_s
        seconds = (f"{row.computed_first_token_s:.3f} s", f"{row.loaded_first_token_s:.3f} s", f"{ratio:.1f} ×")
        same = "the same" if row.same_tokens else "DIFFERENT"
        table.add_row(str(row.prompt_tokens), str(row.loaded_tokens), *seconds, same)
    out.print(table)


def check(rows: list[ModelRow]) -> None:
    """Raises ``CascadeError`` for a prompt whose tokens differ."""
    wrong = [row.prompt_tokens for row in rows if not row.same_tokens]
    if wrong:
        raise CascadeError(f"prompts of {wrong} tokens were continued differently from loaded KV; please report this")


def _half(phase: str, root: str, lengths: tuple[int, ...]) -> list[Answer]:
    module = "cascade_aio.integrations._model_demo"
    lengths_text = msgspec.json.encode(lengths).decode()
    done = subprocess.run(
        [sys.executable, "-m", module, phase, root, lengths_text],
        capture_output=True,
        text=True,
        timeout=PHASE_SECONDS_MAX,
        check=False,
    )
    if done.returncode == 0:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[Answer])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if "ModuleNotFoundError" in last or "ImportError" in last:
        raise UsageError(f"--model runs a model ({last}); pip install 'cascade_aio[transformers]'")
    raise CascadeError(f"the model's process ended with {done.returncode} during {phase}: {last}")
