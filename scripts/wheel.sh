#!/bin/sh
# Build the wheel into dist/ and prove it in an empty virtual environment far from the checkout:
# it must install without a compiler, import, and run the demo.
set -eu

cd "$(dirname "$0")/.."
root=$(pwd -P)
python="$root/.venv/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1

rm -rf dist
"$python" -m pip wheel --quiet --quiet --no-deps --no-build-isolation --config-settings=build-dir=build/wheel --wheel-dir dist .
wheel=$(ls "$root"/dist/cascade_aio-*.whl)
case $wheel in
*-cp311-abi3-linux_*.whl) ;;
*) echo "wheel: $wheel is not an abi3 wheel for Python 3.11 and newer" >&2; exit 1 ;;
esac
if "$python" -m auditwheel --version >/dev/null 2>&1; then
    "$python" -m auditwheel show "$wheel"
fi

elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
trap 'exit 1' INT TERM
"$python" -m venv "$elsewhere/venv"
cd "$elsewhere"
CC=/bin/false venv/bin/python -m pip install --quiet --quiet --only-binary=:all: "$wheel"
venv/bin/python -c "
import cascade_aio, cascade_aio._native as native
assert cascade_aio.__file__.startswith('$elsewhere'), cascade_aio.__file__
print('cascade_aio', cascade_aio.__version__, 'liburing %d.%d' % native.uring_version(), 'copy', native.copy_variant())"
venv/bin/cascade-aio demo --small
echo "wheel: $wheel works in an empty environment"
