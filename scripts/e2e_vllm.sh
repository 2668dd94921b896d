#!/bin/sh
# Every test that needs the real vLLM, in an environment of its own (see server_env.sh). Arguments go to pytest.
set -eu

cd "$(dirname "$0")/.."
python=$(scripts/server_env.sh vllm)
# A copy: beside the checkout's cascade_aio, which is not built for this environment, that one would be imported.
tree=build/e2e-vllm
rm -rf "$tree"
mkdir -p "$tree/tests"
cp -R tests/integrations "$tree/tests/"
cp -R examples pyproject.toml "$tree/"
cd "$tree"
exec "$python" -m pytest -q -p no:cacheprovider tests/integrations "$@"
