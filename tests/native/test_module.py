"""The compiled module itself: its tag, what it links, and that its typing matches the header."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cascade_aio
from cascade_aio._native import OP, OpCode, OpFlag, RingFeature, _library
from cascade_aio._native.ring import COMPLETION

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "cascade_aio" / "_native" / "_cascade.pyi"


def load_generator() -> object:
    spec = importlib.util.spec_from_file_location("cffi_build_build", ROOT / "cffi_build" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def header_declarations() -> str:
    text: str = load_generator().declarations((ROOT / "c" / "cascade.h").read_text())  # type: ignore[attr-defined]
    return text


def module_path() -> Path:
    spec = importlib.util.find_spec("cascade_aio._native._cascade")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def test_one_module_for_every_python() -> None:
    assert module_path().name == "_cascade.abi3.so"


def test_nothing_but_the_c_library_is_linked() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed; install binutils")
    output = subprocess.run([readelf, "-d", module_path()], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", output)
    assert [name for name in needed if not name.startswith(("libc.", "ld-linux", "libpthread."))] == []


def test_the_stub_lists_exactly_the_functions_of_the_header() -> None:
    declared = set(re.findall(r"\b(cascade_\w+)\(", header_declarations()))
    tree = ast.parse(STUB.read_text())
    (library,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "NativeLibrary")
    assert {node.name for node in library.body if isinstance(node, ast.FunctionDef)} == declared
    assert all(hasattr(_library.lib, name) for name in declared)


@pytest.mark.parametrize(
    ("prefix", "names"),
    [("CASCADE_OP_", OpCode), ("CASCADE_OPF_", OpFlag), ("CASCADE_FEATURE_", RingFeature)],
)
def test_constants_agree_with_the_header(prefix: str, names: type[OpCode] | type[OpFlag] | type[RingFeature]) -> None:
    declared = dict(re.findall(rf"\b{prefix}(\w+)\s*=\s*(\d+)", header_declarations()))
    assert {member.name: int(member) for member in names} == {name: int(value) for name, value in declared.items()}


def test_struct_formats_agree_with_the_compiler() -> None:
    assert OP.size == _library.ffi.sizeof("struct cascade_op")
    assert COMPLETION.size == _library.ffi.sizeof("struct cascade_completion")


def test_the_generator_refuses_a_header_without_markers() -> None:
    with pytest.raises(ValueError, match="lacks"):
        load_generator().declarations("int f(void);")  # type: ignore[attr-defined]


def test_a_missing_module_says_how_to_build_it(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['cascade_aio._native._cascade'] = None\n"
        "try:\n    import cascade_aio._native\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "make build" in done.stdout


def test_version_has_one_source() -> None:
    assert importlib.metadata.version("cascade_aio") == cascade_aio.__version__
