"""The help texts: what stands there is all that an operator has on a terminal of 80 columns."""

from __future__ import annotations

import pytest

from cascade_aio.config import CONFIG_KEYS, SWITCHES, StoreConfig, format_size
from tests.cli.conftest import Cli


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_option_names_are_whole_on_80_columns(cli: Cli) -> None:
    shown = cli("serve", "--help").out
    words = shown.split()
    for name in ("pinned-bytes-per-client-max", "no-verify-seals", *(key.replace("_", "-") for key in CONFIG_KEYS)):
        assert f"--{name}" in words
    for key in SWITCHES:
        assert f"--no-{key.replace('_', '-')}" in words
    assert "\u2026" not in shown


def test_the_version_is_where_everybody_looks_for_it(cli: Cli) -> None:
    call = cli("--version")
    assert call.code == 0
    assert call.out == cli("version").out


def test_an_interrupt_outside_of_a_command_is_no_traceback(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cascade_aio.cli._run", interrupt)
    assert cli("version").code == 130


def test_settings_tell_their_defaults(cli: Cli) -> None:
    shown = " ".join(cli("serve", "--help").out.split())
    defaults = StoreConfig(root="kv")
    for key in ("shm_bytes", "segment_bytes", "stripe_bytes", "compaction_bandwidth"):
        assert f"[default: {format_size(getattr(defaults, key))}]" in shown
    assert f"[default: {defaults.adopt_seconds:g} s]" in shown
    assert "Register the arena with io_uring. [default: on]" in shown
