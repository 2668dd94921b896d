"""``cascade-aio demo --model``: a model continues prompts from KV of an earlier process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cascade_aio.cli import demo_model
from cascade_aio.cli.app import app
from cascade_aio.cli.demo_model import Answer, ModelRow
from cascade_aio.errors import CascadeError

HAS_MODEL = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.mark.skipif(not HAS_MODEL, reason="torch and transformers are not installed (pip install '.[transformers]')")
def test_a_new_process_of_the_model_gives_the_same_tokens(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--model", "--small", "--json", "--root", str(tmp_path / "here")])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["same_tokens"]
    assert row["loaded_tokens"] >= row["prompt_tokens"] // 2
    assert not (tmp_path / "here").exists()


@pytest.mark.skipif(HAS_MODEL, reason="torch and transformers are installed")
def test_without_torch_it_says_what_to_install(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--model", "--root", str(tmp_path / "here")])
    assert done.exit_code != 0
    assert "cascade_aio[transformers]" in (done.output + str(done.exception))


def test_other_tokens_are_an_error_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(phase: str, root: str, lengths: tuple[int, ...]) -> list[Answer]:
        Path(root).mkdir(exist_ok=True)
        return [Answer(0, 1.0, [1, 2, 3 if phase == "save" else 4]) for _ in lengths]

    monkeypatch.setattr(demo_model, "_half", half)
    rows = demo_model.play(str(tmp_path), (512,))
    assert rows == [ModelRow(512, 0, 1.0, 1.0, same_tokens=False)]
    with pytest.raises(CascadeError, match="512"):
        demo_model.check(rows)
    demo_model.print_rows(rows)
