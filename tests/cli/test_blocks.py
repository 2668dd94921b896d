"""put, get, ls, stat and verify through the real store."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

CONTENT = bytes(range(256)) * 41


@pytest.fixture
def stored(tmp_path: Path, cli: Cli) -> tuple[Path, str]:
    """A root with one block, and its id."""
    (tmp_path / "one").write_bytes(CONTENT)
    call = cli("put", tmp_path / "one", "--root", tmp_path / "root", "--json")
    assert call.code == 0, call.err
    return tmp_path / "root", call.json[0]["block_id"]


def test_a_stored_file_is_listed_and_comes_back(stored: tuple[Path, str], tmp_path: Path, cli: Cli) -> None:
    root, block_id = stored
    assert block_id == hashlib.sha256(CONTENT).hexdigest()[:32]
    listed = cli("ls", root, "--json").json
    assert listed == [
        {"block_id": block_id, "key_bytes": 0, "value_bytes": len(CONTENT), "tiers": ["disk"], "prefixes": 0}
    ]
    assert block_id in cli("ls", "--root", root).out
    got = cli("get", block_id.upper(), "-o", tmp_path / "back", "--root", root, "--json")
    assert got.json["tier"] == "disk"
    assert (tmp_path / "back").read_bytes() == CONTENT


def test_key_bytes_split_a_file_into_parts(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "one").write_bytes(CONTENT)
    (tmp_path / "two").write_bytes(CONTENT[::-1])
    call = cli("put", tmp_path / "one", tmp_path / "two", "--key-bytes", "1k", "--root", tmp_path / "root", "--json")
    rows = call.json
    assert [(row["key_bytes"], row["value_bytes"]) for row in rows] == [(1024, len(CONTENT) - 1024)] * 2
    for part, expected in (("key", CONTENT[:1024]), ("value", CONTENT[1024:]), ("all", CONTENT)):
        name = rows[0]["block_id"]
        assert cli("get", name, "-o", tmp_path / part, "--part", part, "--root", tmp_path / "root").code == 0
        assert (tmp_path / part).read_bytes() == expected


def test_put_says_so_if_the_root_is_too_small_for_all(tmp_path: Path, cli: Cli) -> None:
    files = [tmp_path / str(number) for number in range(12)]
    for number, path in enumerate(files):
        path.write_bytes(number.to_bytes(1, "little") * (2 << 20))
    call = cli("put", *files, "--root", tmp_path / "root", "--disk-bytes", "16MiB", "--json")
    assert call.code == 1
    stored = {row["block_id"] for row in call.json if row["stored"]}
    assert 0 < len(stored) < len(files)
    assert f"{len(files) - len(stored)} of {len(files)} blocks had to make room" in call.err
    left = {row["block_id"] for row in cli("ls", tmp_path / "root", "--json").json}
    assert left
    assert left <= stored


def test_an_arena_that_the_machine_does_not_grant_is_told(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "one").write_bytes(CONTENT)
    call = cli("put", tmp_path / "one", "--root", tmp_path / "root", "--shm-bytes", "4000PiB")
    assert call.code == 1
    assert "smaller shm_bytes" in call.err


def test_get_writes_to_a_pipe(stored: tuple[Path, str]) -> None:
    root, block_id = stored
    command = [sys.executable, "-m", "cascade_aio", "get", block_id, "--root", str(root)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == CONTENT


def test_stat_and_verify_of_a_sound_root(stored: tuple[Path, str], cli: Cli) -> None:
    root, _ = stored
    assert cli("stat", root, "--json").json["blocks"] == 1
    assert "disk." in cli("stat", root).out
    report = cli("verify", root, "--json")
    assert (report.code, report.json["blocks"], report.json["damage"]) == (0, 1, [])
    assert "all intact" in cli("verify", root).out


def test_verify_names_the_damage_and_exits_with_1(stored: tuple[Path, str], cli: Cli) -> None:
    root, block_id = stored
    segment, position = find_bytes(root, CONTENT[:512])
    with open(segment, "r+b") as file:
        file.seek(position + 100)
        file.write(b"\xff")
    report = cli("verify", root, "--json")
    assert report.code == 1
    [damage] = report.json["damage"]
    assert damage["path"] == str(segment)
    assert abs(damage["offset"] - position) <= 1 << 20
    told = cli("verify", root)
    assert told.code == 1
    assert str(segment) in told.err.replace("\n", "")
    assert f"cascade-aio repair {root}" in told.err
    got = cli("get", block_id, "-o", root / "back", "--root", root)
    assert got.code == 1
    assert not (root / "back").exists()


def test_verify_sends_nobody_to_repair_what_it_could_only_not_read(
    stored: tuple[Path, str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = stored
    real = os.open

    def refuse(path: str | os.PathLike[str], flags: int, mode: int = 0o777, **more: int | None) -> int:
        if os.fspath(path).endswith(".seg"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", refuse)
    told = cli("verify", root)
    assert told.code == 1
    assert "1 unreadable" in told.out
    assert "verify again" in told.err
    assert "repair" not in told.err


def find_bytes(root: Path, wanted: bytes) -> tuple[Path, int]:
    for path in sorted(root.rglob("*.seg")):
        position = path.read_bytes().find(wanted)
        if position >= 0:
            return path, position
    raise AssertionError("the payload is in no segment")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["get", "0" * 32, "-o", "x", "--root", "ROOT"], 1, "0" * 32),
        (["get", "xyz", "-o", "x", "--root", "ROOT"], 2, "32 hex digits"),
        (["get", "0" * 32, "--json", "--root", "ROOT"], 2, "-o FILE"),
        (["ls", "absent"], 2, "absent is not a directory"),
        (["ls"], 2, "CASCADE_ROOT"),
        (["ls", "ROOT", "--root", "other"], 2, "given twice"),
        (["ls", "ROOT", "--shm-bytes", "4 parsecs"], 2, "shm_bytes='4 parsecs'"),
        (["ls", "ROOT", "--io-backend", "aio"], 2, "auto, uring, threads"),
        (["ls", "ROOT", "--config", "absent.toml"], 2, "absent.toml: No such file"),
        (["ls", "ROOT", "--colour"], 2, "No such option"),
        (["put", "absent", "--root", "ROOT"], 1, "No such file"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_a_wrong_call_ends_with_one_clear_line(
    stored: tuple[Path, str], cli: Cli, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = stored
    monkeypatch.chdir(root.parent)
    call = cli(*(str(root) if argument == "ROOT" else argument for argument in arguments))
    assert (call.code, call.out) == (code, "")
    assert message in call.err
    assert "Traceback" not in call.err


def test_settings_come_from_a_file_and_from_variables(
    stored: tuple[Path, str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, block_id = stored
    file = root.parent / "cascade.toml"
    file.write_text(f'root = "{root}"\nio_backend = "threads"\n')
    assert cli("ls", "--config", file, "--json").json[0]["block_id"] == block_id
    assert cli("stat", "--config", file, "--json").json["io"]["backend"] == "threads"
    monkeypatch.setenv("CASCADE_ROOT", str(root))
    assert cli("ls", "--json").json[0]["block_id"] == block_id
    monkeypatch.setenv("CASCADE_WORKRES", "1")
    call = cli("ls")
    assert (call.code, "did you mean workers" in call.err) == (2, True)


def test_an_unwritable_root_is_one_clear_line(tmp_path: Path, cli: Cli) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "root").mkdir(mode=0o500)
    (tmp_path / "one").write_bytes(CONTENT)
    call = cli("put", tmp_path / "one", "--root", tmp_path / "root")
    assert call.code == 1
    assert len(call.err.strip().splitlines()) == 1


def test_version(cli: Cli) -> None:
    assert cli("version", "--json").json["version"] in cli("version").out


def test_every_setting_has_help() -> None:
    from cascade_aio.cli.options import SETTING_HELP
    from cascade_aio.config import CONFIG_KEYS

    assert tuple(SETTING_HELP) == CONFIG_KEYS


@pytest.mark.parametrize("command", ["ls", "stat", "verify"])
def test_looking_at_an_empty_directory_does_not_make_it_a_store(tmp_path: Path, cli: Cli, command: str) -> None:
    call = cli(command, tmp_path)
    assert (call.code, list(tmp_path.iterdir())) == (1, [])
    assert "holds no store" in call.err


def test_a_command_that_is_killed_leaves_no_memory_behind(stored: tuple[Path, str]) -> None:
    """Whatever signal ends it: its arena has no name."""
    root, block_id = stored
    before = {name for name in os.listdir("/dev/shm") if name.startswith("cascade-cli")}
    for arguments in (["get", block_id, "--root", str(root)], ["put", __file__, "--root", str(root)]):
        child = subprocess.Popen([sys.executable, "-m", "cascade_aio", *arguments], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.read(1)  # it is at work
        child.kill()
        child.communicate()
    assert {name for name in os.listdir("/dev/shm") if name.startswith("cascade-cli")} <= before
