"""Peers that CI does not install: what can be said of them without, and the conformance suite where they are there."""

from __future__ import annotations

import pathlib

import cffi
import pytest

from bench.peers.catalog import entries
from bench.peers.pdc import binding
from bench.peers.protocol import CannotRunError
from bench.results import CannotRunError as NotHereError
from bench.suite import environments
from bench.suite.client import Client

OTHERS = ("lmcache", "mooncake", "nixl", "pdc")
CHECKS = ("describes", "returns bytes", "knows misses", "keeps its own copy")
"""LMCache takes seconds to start, Mooncake more: `python -m bench conform SYSTEM` runs all checks."""


@pytest.mark.slow
@pytest.mark.parametrize("system", ["nixl-direct", "lmcache-disk", "pdc"])
async def test_a_peer_that_is_installed_conforms(system: str, tmp_path: pathlib.Path) -> None:
    try:
        python = environments.interpreter(system)
    except NotHereError as error:
        pytest.skip(str(error))
    async with Client.started(system, python, tmp_path) as client:
        for number, check in enumerate(CHECKS):
            folder = tmp_path / str(number)
            folder.mkdir()
            try:
                await client.ask("conform", check=check, folder=str(folder))
            except NotHereError as error:
                pytest.skip(str(error))


@pytest.mark.parametrize("peer", OTHERS)
def test_everything_a_peer_installs_is_pinned(peer: str) -> None:
    (requirements,) = {entry.requirements for entry in entries().values() if entry.peer == peer}
    lines = requirements.read_text().splitlines()
    asked = [line for line in lines if line and not line.startswith("#")]
    asked += [line.removeprefix("# no-deps:").strip() for line in lines if line.startswith("# no-deps:")]
    assert any(line.startswith("numpy==") for line in asked)
    assert all("==" in line for line in asked), asked


def test_pdc_is_not_run_without_an_installation(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(binding.DIRECTORY_VARIABLE, raising=False)
    with pytest.raises(CannotRunError, match="PDC_DIR is not set"):
        binding.installation()
    monkeypatch.setenv(binding.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(CannotRunError, match="without bin/pdc_server"):
        binding.installation()
    for name in ("bin/pdc_server", "bin/close_server", "include/pdc.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert binding.installation() == tmp_path.resolve()


def test_the_version_of_pdc_is_what_its_installation_says(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CannotRunError, match="does not say its version"):
        binding.version(tmp_path)
    (tmp_path / "pdc-config.cmake").write_text("set(PDC_VERSION_STRING  0.1.0)\n")
    assert binding.version(tmp_path) == "0.1.0"


def test_the_declarations_of_pdc_are_understood_by_cffi() -> None:
    builder = cffi.FFI()
    builder.cdef(binding.DECLARATIONS)
    assert builder.sizeof("pdcid_t") == 8
