"""c/smoke.c, built by the project's CMake file with ASan and UBSan, run once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "c"
BUILD_S_MAX = 120
RUN_S_MAX = 120


def run(*command: str, timeout_s: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    name = os.environ.get("CC", "cc")
    if shutil.which(name) is None:
        pytest.skip(f"no C compiler ({name}); install gcc")
    program = tmp_path / "empty.c"
    program.write_text("int main(void) { return 0; }\n")
    probe = run(
        name, "-fsanitize=address,undefined", str(program), "-o", str(tmp_path / "empty"), timeout_s=BUILD_S_MAX
    )
    if probe.returncode != 0:
        pytest.skip(f"{name} cannot link the sanitizers; install libasan and libubsan: {probe.stderr.strip()[-200:]}")
    if run(str(tmp_path / "empty"), timeout_s=RUN_S_MAX).returncode != 0:
        pytest.skip("programs built with the address sanitizer do not run on this kernel")
    return name


@pytest.fixture
def cmake() -> list[str]:
    if importlib.util.find_spec("cmake") is None:
        pytest.skip("the cmake package is not installed; install the dev extra")
    return [sys.executable, "-m", "cmake"]


def test_smoke_runs_clean_under_sanitizers(compiler: str, cmake: list[str], tmp_path: Path) -> None:
    build = tmp_path / "build"
    make_program = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={make_program}"] if make_program else []
    configured = run(
        *cmake, "-S", str(SOURCE), "-B", str(build), "-DCASCADE_SMOKE=ON", f"-DCMAKE_C_COMPILER={compiler}", *generator,
        timeout_s=BUILD_S_MAX,
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = run(*cmake, "--build", str(build), timeout_s=BUILD_S_MAX)
    assert built.returncode == 0, built.stdout + built.stderr

    smoke = run(str(build / "cascade_smoke"), timeout_s=RUN_S_MAX)

    assert smoke.returncode == 0, smoke.stdout + smoke.stderr
    assert "ok prefault and notify" in smoke.stdout
    skipped = [line for line in smoke.stdout.splitlines() if line.startswith("skip ring")]
    if skipped:
        warnings.warn(f"C smoke test: {'; '.join(skipped)}", stacklevel=1)
    else:
        assert "ok ring: cancel and eventfd" in smoke.stdout


def test_missing_liburing_is_an_error_that_names_the_package(compiler: str, cmake: list[str], tmp_path: Path) -> None:
    nowhere = [
        f"-DCMAKE_FIND_ROOT_PATH={tmp_path}",
        "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY",
        "-DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY",
    ]
    settings = ["-DCASCADE_SMOKE=ON", f"-DCMAKE_C_COMPILER={compiler}", *nowhere]
    configured = run(*cmake, "-S", str(SOURCE), "-B", str(tmp_path / "build"), *settings, timeout_s=BUILD_S_MAX)
    assert configured.returncode != 0
    assert "apt-get install liburing-dev" in configured.stderr
    assert "dnf install liburing-devel" in configured.stderr
