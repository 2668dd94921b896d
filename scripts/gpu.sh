#!/bin/sh
# The GPU tier on a machine with a GPU that can fetch nothing, in two steps.
#   scripts/gpu.sh prepare        here: wheels of this checkout and of what it needs for Python 3.12, into .whl/
#   scripts/gpu.sh run OUT        there: install them beside its Python, run the tests marked gpu and bench.gpu
# .whl/ is not tracked; it travels with the working tree. OUT gets gpu.json, the logs, and what compute-sanitizer says.
set -eu

cd "$(dirname "$0")/.."
root=$(pwd -P)

prepare() {
    rm -rf .whl
    mkdir .whl
    .venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --config-settings=build-dir=build/wheel \
        --wheel-dir .whl .
    # What a PyTorch image lacks; cuda-bindings, numpy, rich and typer are there.
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 -d .whl \
        blake3 crc32c msgspec sortedcontainers pydantic-settings pydantic pydantic-core typing-inspection typing_extensions annotated-types \
        python-dotenv cffi pycparser pytest-asyncio async-solipsism
    du -sh .whl
}

run() {
    out=$1
    site=/tmp/cascade-site
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
    export PYTHONPATH="$site" PYTHONUNBUFFERED=1
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/device.txt"
    # Containers start with 64 MiB of shared memory; the machine is ours.
    mount -o remount,size=24G /dev/shm 2>/dev/null || true
    df -h /dev/shm /tmp
    # The wheel by itself, from elsewhere.
    (cd / && python3 -c "import cascade_aio, sys; print('wheel', cascade_aio.__file__, sys.version.split()[0])")
    # Tests and figures run in the tree, with the wheel's compiled module.
    cp "$site"/cascade_aio/_native/_cascade.*.so cascade_aio/_native/
    failed=0
    python3 -m pytest -q -m gpu -p no:cacheprovider tests/tiers/test_cuda_driver.py tests/gpu/test_cuda.py \
        >"$out/pytest.txt" 2>&1 || failed=1
    tail -n 25 "$out/pytest.txt"
    python3 -m bench.gpu --out "$out/gpu.json" 2>&1 | tee "$out/bench.txt"
    if command -v compute-sanitizer >/dev/null; then
        compute-sanitizer --error-exitcode 9 python3 -m pytest -q -m gpu -p no:cacheprovider --timeout 200 \
            tests/tiers/test_cuda_driver.py >"$out/sanitizer.txt" 2>&1 || failed=1
        tail -n 8 "$out/sanitizer.txt"
    fi
    rm -f cascade_aio/_native/_cascade.*.so
    return "$failed"
}

case ${1-} in
prepare) prepare ;;
run) run "${2:?scripts/gpu.sh run OUT: a folder for results}" ;;
*) sed -n 's/^# \{0,1\}//p' "$0" | sed -n 2,6p >&2; exit 2 ;;
esac
echo "gpu: $root ${1} done"
