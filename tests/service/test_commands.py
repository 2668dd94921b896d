"""The commands around a service: what they print, and what they say when called wrongly."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from cascade_aio.cli import main
from cascade_aio.daemon import connect
from cascade_aio.testing.store import eventually
from tests.service.conftest import KEYS, running

SECONDS_MAX = 60.0


async def command(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``cascade-aio``."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cascade_aio", *words, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(SECONDS_MAX):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_prefetch_promotes_what_a_file_names(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        for i in range(3):
            await store.put(bytes([i]), b"value", prefix=KEYS[i])
        await store.flush()
    async with running(tmp_path / "kv") as service:
        lines = "\n".join([*map(str, KEYS[:4]), ""])
        where = ("--socket", service.socket_path)
        code, out, err = await command("prefetch", *where, "--keys", "-", "--json", stdin=lines.encode())
        assert code == 0, err
        progress = json.loads(out)
        assert (progress["wanted"], progress["landed"], progress["unknown"]) == (4, 3, 1)
        (tmp_path / "keys").write_text(lines)
        code, out, _ = await command("prefetch", *where, "--keys", str(tmp_path / "keys"))
        assert code == 0
        assert "3 were there" in out


async def test_hits_without_a_message_are_counted_to_the_last(tmp_path: Path) -> None:
    """A client that ends before its next report tells what it has not told yet; ``top`` shows what was told."""
    async with running(tmp_path / "kv") as service:
        async with connect(service.socket_path) as store:
            await store.put(b"", b"value", prefix=KEYS[0])
            for _ in range(50):
                async with store.get(KEYS[0]):
                    pass
            alone = store.statistics()["shared_gets"]
            assert alone
        await eventually(lambda: service.node.counters.shared_hits == alone)
        code, out, err = await command("top", "--socket", service.socket_path, "--count", "1")
        assert code == 0, err
        (row,) = (line for line in out.splitlines() if "without a message" in line)
        assert row.split()[-1] == str(alone)


async def test_top_looks_and_ends(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service:
        code, out, err = await command("top", "--socket", service.socket_path, "--count", "2", "--interval", "0.1")
        assert code == 0, err
        assert "shm" in out
        assert "per second" in out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["serve", "ROOT", "--http", "nowhere"], "host:port"),
        (["serve", "ROOT", "--socket", "/" + "x" * 200], "107"),
        (["serve", "ROOT", "--shm", "1GiB", "--shm-bytes", "1GiB"], "one of them"),
        (["serve", "ROOT", "--group", "no-such-group"], "no-such-group"),
        (["prefetch", "--keys", "-"], "--socket PATH"),
        (["prefetch", "--socket", "/x", "--keys", "/no/such/file"], "/no/such/file"),
        (["top", "--socket", "/x", "--interval", "0"], "--interval"),
        (["top", "--root", "ROOT"], "cascade-aio serve"),
        (["serve", "ROOT/a/b"], "--create"),
        (["serve", "ROOT", "--read-only"], "read_only: a node service writes"),
        (["serve", "ROOT", "--gpu-bytes", "1GiB"], "gpu_bytes: a node service lends no device memory"),
        (["prefetch", "--socket", "/x", "--keys", sys.executable], "is no text"),
        (["serve", "ROOT", "--shm-dir", "/no/such"], "shm_dir='/no/such' is not a directory"),
    ],
)
def test_a_wrong_call_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main([word.replace("ROOT", str(tmp_path / "kv")) for word in words])
    assert not list(tmp_path.iterdir()), "nothing is made by mistake"
    assert end.value.code in (1, 2)
    assert complaint in capsys.readouterr().err


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("example", ["systemd/cascade-aio.service", "slurm/serve.sbatch"])
def test_the_examples_use_options_that_there_are(
    example: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    (call,) = re.findall(r"cascade-aio serve (.*)", (EXAMPLES / example).read_text())
    assert set(re.findall(r"--[a-z-]+", call)) <= known


def test_the_job_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm/serve.sbatch")], check=True)
