"""Sizes, validation, and the order of the sources of settings."""

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.config import (
    CONFIG_KEYS,
    GIB,
    MIB,
    StoreConfig,
    arena_name,
    format_size,
    load_config,
    make_config,
    parse_size,
)
from cascade_aio.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("64GiB", 64 * GIB),
        ("64 GB", 64_000_000_000),
        ("1.5TiB", 1536 * GIB),
        (" .5 kib ", 512),
        ("512k", 512 * 1024),
        ("2M", 2 * MIB),
        ("100_000b", 100_000),
        ("0.3 b", 0),
    ],
)
def test_parse_size_reads_what_people_write(text: Any, size: Any) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "nonsense",
    ["", "GiB", "-1", "-4KiB", "1e3", "4 KiBs", "1,5 GB", "4GiB 2", "nan", "٤k", True, 1.5, None, b"1", -1, 2**63],
)
def test_parse_size_refuses_nonsense_with_a_cure(nonsense: Any) -> None:
    with pytest.raises(ConfigError, match="write a size such as"):
        parse_size(nonsense)


@given(st.integers(0, 2**62))
def test_format_size_stays_within_a_hundredth_of_a_unit(size: Any) -> None:
    text = format_size(size)
    assert abs(parse_size(text) - size) <= 0.005 * parse_size("1" + text.split()[1]) + 1


@given(st.text(max_size=12))
def test_parse_size_raises_nothing_else(text: Any) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": ""}, "root=''"),
        ({"shm_dir": "shm"}, "absolute"),
        ({"shm_bytes": 4096}, "shm_bytes=4096 must be between 1 MiB"),
        ({"shm_bytes": MIB + 1}, "multiple of 4096; use 1048576"),
        ({"shm_bytes": "4 lightyears"}, "^shm_bytes="),
        ({"disk_bytes": 5}, "disk_bytes=5"),
        ({"segment_bytes": 128 * GIB}, "64 GiB"),
        ({"stripe_bytes": 4096 * 20}, "multiple of 65536; use 65536"),
        ({"stripe_count": 0}, "stripe='off'"),
        ({"workers": 0}, "between 1 and 256"),
        ({"workers": True}, "whole number"),
        ({"workers": "many"}, "whole number"),
        ({"tail_seconds_max": float("nan")}, "3600 seconds"),
        ({"read_seconds_max": "soon"}, "number of seconds"),
        ({"io_backend": "aio"}, "auto, uring, threads"),
        ({"digest": "md5"}, "sha256, blake3"),
        ({"register_buffers": "yes"}, "true or false"),
        ({"arena": "a/b"}, "shm_dir"),
        ({"arena": "a" * 300}, "shorter"),
        ({"bytes_in_flight_max": MIB}, "request_bytes_max"),
        ({"shm_byte": 1}, "did you mean shm_bytes"),
        ({"colour": 1}, "the settings are root, shm_bytes"),
    ],
)
def test_a_wrong_setting_is_named_with_its_cure(options: Any, message: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{"root": "/r", **options})


@pytest.mark.parametrize("given", [(0, 1), [0, 1], "0,1", "0 1", "(0, 1)"])
def test_devices_are_written_in_several_ways(given: Any) -> None:
    assert make_config("/r", gpu_bytes="1MiB", gpu_devices=given).gpu_devices == (0, 1)
    assert make_config("/r", gpu_devices=2).gpu_devices == (2,)


@pytest.mark.parametrize("given", ["", "a", "-1", (), (0, 0), (True,), -1, None, 1.5])
def test_what_are_no_devices(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"gpu_devices=.*each once"):
        make_config("/r", gpu_devices=given)


def test_sizes_in_text_are_rounded_down_to_the_alignment_of_their_key() -> None:
    assert make_config("/r", shm_bytes="1GB").shm_bytes == 1_000_000_000 // 4096 * 4096
    assert make_config("/r", disk_bytes="1GB").disk_bytes == 1_000_000_000


def test_a_config_cannot_be_made_wrong_by_replace() -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(make_config("/r"), shm_bytes=1)


def test_arguments_before_variables_before_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "cascade.toml"
    file.write_text(
        'root = "/file"\nshm_bytes = "64MiB"\nworkers = 3\nregister_buffers = false\ndisk_bytes = 4000000000\n'
    )
    environment = {"CASCADE_SHM_BYTES": "32MiB", "CASCADE_WORKERS": "5", "CASCADE_DISK_BYTES": "none", "HOME": "/x"}
    config = load_config({"workers": 7, "digest": None}, config_file=file, environment=environment)
    assert (config.workers, config.shm_bytes, config.root) == (7, 32 * MIB, "/file")
    assert config.register_buffers is False
    assert config.disk_bytes is None
    assert config.digest == "sha256"
    named = load_config(environment={"CASCADE_CONFIG": str(file)})
    assert named == load_config(config_file=file, environment={})


@pytest.mark.parametrize("key", [k for k in CONFIG_KEYS if k not in ("root", "arena")])
def test_every_default_survives_a_round_trip_through_variables(key: Any) -> None:
    default = getattr(StoreConfig(root="/r"), key)
    config = load_config({"root": "/r"}, environment={f"CASCADE_{key.upper()}": str(default)})
    assert config == StoreConfig(root="/r")


@pytest.mark.parametrize(
    ("arguments", "environment", "toml", "message"),
    [
        ({"shm_bytes": "1x"}, {}, "", "^arguments: shm_bytes='1x'"),
        ({}, {"CASCADE_SHM_BYTES": "12k"}, "", "^CASCADE_SHM_BYTES: shm_bytes=12288 must be between"),
        ({}, {"CASCADE_SHM_BYTES": "5"}, "", "^CASCADE_SHM_BYTES: shm_bytes=5 must be between"),
        ({}, {"CASCADE_REGISTER_BUFFERS": "maybe"}, "", "^CASCADE_REGISTER_BUFFERS: .*boolean"),
        ({}, {"CASCADE_SHM_BYTE": "1"}, "", "CASCADE_SHM_BYTE: .*did you mean shm_bytes"),
        ({}, {}, 'digest = "md5"', r"cascade.toml: digest='md5' is unknown; use one of sha256, blake3"),
        ({}, {}, "worker = 1", r"cascade.toml: worker is no setting; did you mean workers"),
        ({}, {}, "workers = [1]", r"cascade.toml: workers=\[1\] must be a whole number"),
        ({}, {}, "workers = = 1", "cascade.toml is not TOML"),
    ],
)
def test_a_wrong_setting_names_its_source(
    tmp_path: Path, arguments: Any, environment: Any, toml: Any, message: Any
) -> None:
    file = tmp_path / "cascade.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError, match=message):
        load_config({"root": "/r", **arguments}, config_file=file, environment=environment)


def test_a_missing_file_and_a_missing_root_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load_config({"root": "/r"}, config_file=tmp_path / "absent.toml", environment={})
    with pytest.raises(ConfigError, match="CASCADE_ROOT"):
        load_config(environment={"CASCADE_TEST_SEEDS": "9"})


def test_arena_name_is_one_per_root_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    names = {arena_name(make_config(root)) for root in (tmp_path / "root", "root", "./root/", "link")}
    assert len(names) == 1
    assert "/" not in names.pop()
    assert arena_name(make_config("other")) != arena_name(make_config("root"))
    assert arena_name(make_config("root", arena="mine")) == "mine"


def test_importing_config_does_not_import_pydantic() -> None:
    code = "import sys, cascade_aio.config as c; c.make_config('/r'); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
