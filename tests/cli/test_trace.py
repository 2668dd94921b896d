"""``cascade-aio trace``: tables, JSON, formats of logs, wrong arguments, the figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cascade_aio.cli.app import app
from cascade_aio.cli.trace_files import CHAT_BLOCK_TOKENS, CHAT_TOKEN_BYTES, load_tokenizer, read_trace
from cascade_aio.cli.trace_mix import MixPlan, mixed_trace
from cascade_aio.errors import ConfigError

CHAT_BLOCK_BYTES = CHAT_BLOCK_TOKENS * CHAT_TOKEN_BYTES
SYSTEM = {"role": "system", "content": "s" * 3 * CHAT_BLOCK_BYTES}


def _hash_trace(path: Path) -> Path:
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 9, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 4]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["trace", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_of_a_hash_trace(tmp_path: Path) -> None:
    path = _hash_trace(tmp_path / "t.jsonl")
    (record,) = json.loads(_run(str(path), "--policies", "lru,hit-density", "--capacities", "100%", "--json"))
    assert (record["trace"], record["requests"], record["blocks"], record["different_blocks"]) == ("t", 2, 6, 4)
    assert [score["policy"] for score in record["scores"]] == ["lru", "hit-density"]
    for score in record["scores"]:
        assert score["hit_blocks"] == 2
        assert score["hit_tokens"] == 1024
        assert score["token_hit_rate"] == pytest.approx(1024 / 2200)


def test_table_with_ours_beside_the_best_simple_policy(tmp_path: Path) -> None:
    text = _run(str(_hash_trace(tmp_path / "t.jsonl")), "--capacities", "50%,1.0", "--unit", "tokens")
    assert "clairvoyant" in text
    assert "best" in text
    assert "block events per CPU second" in text


def test_without_a_file_a_mix_is_generated(tmp_path: Path) -> None:
    first, second = (
        json.loads(_run("--policies", "fifo", "--capacities", "1%", "--seed", seed, "--json")) for seed in ("1", "2")
    )
    assert first[0]["trace"] == "mixed"
    assert first[0]["blocks"] != second[0]["blocks"]


def test_chat_log_turns_share_their_prefix(tmp_path: Path) -> None:
    """The second turn repeats the first with a reply and a question more; parts and strings are both text."""
    question = {"role": "user", "content": [{"type": "text", "text": "q" * CHAT_BLOCK_BYTES}]}
    reply = {"role": "assistant", "content": "a" * CHAT_BLOCK_BYTES}
    path = tmp_path / "chat.jsonl"
    turns: list[list[object]] = [
        [SYSTEM, question],
        [SYSTEM, question, reply, question],
        [{"role": "user", "content": None}],
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    trace = read_trace(path)
    first, second = trace.chains
    assert second[: len(first)] == first
    assert len(second) == len(first) + 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1: not a request"),
        ('{"prompt": 1}', "neither hash_ids nor messages"),
        ('{"hash_ids": [1], "input_length": -5}', "must not be negative"),
        ("", "no request with a full block"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "are its prompts shorter"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_a_chat_log_by_tokens(tmp_path: Path) -> None:
    """Words as tokens: blocks of four of them, whatever they weigh in bytes; the last one is not full."""
    path = tmp_path / "chat.jsonl"
    texts = ["a b c d e f g h i", "a b c d e f g h changed and longer than before"]
    lines = [json.dumps({"messages": [{"role": "user", "content": f" {text}"}]}) for text in texts]
    path.write_text("\n".join(lines))
    vocabulary: dict[str, int] = {}
    trace = read_trace(
        path,
        encode=lambda text: [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()],
        block_tokens=4,
    )
    assert [len(chain) for chain in trace.chains] == [2, 3]
    assert trace.chains[0][0] == trace.chains[1][0]
    assert trace.chains[0][1] == trace.chains[1][1]
    assert set(trace.tokens) == {4}


def test_a_tokenizer_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="--tokenizer"):
        load_tokenizer(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="check the path"):
        read_trace(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "arguments", [["--policies", "magic"], ["--capacities", "much"], ["--capacities", ""], ["--unit", "pages"]]
)
def test_wrong_arguments_are_usage_errors(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["trace", *arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigError | SystemExit)


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: bench)")
    target = tmp_path / "out.png"
    _run(str(_hash_trace(tmp_path / "t.jsonl")), "--capacities", "50%,100%", "--figure", str(target))
    assert target.read_bytes().startswith(b"\x89PNG")


def test_the_mix_is_reproducible_and_its_plan_checked() -> None:
    plan = MixPlan(sessions=50, seed=4)
    assert mixed_trace(plan).chains == mixed_trace(plan).chains
    with pytest.raises(ConfigError, match="scan_share"):
        MixPlan(scan_share=2.0)
    with pytest.raises(ConfigError, match="sessions"):
        MixPlan(sessions=0)
