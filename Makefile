# Entry points for people and CI. Every target may be repeated; each sets up .venv first if needed.
#   make demo     see the store work        make bench    measure it against the raw limits
#   make test     run all tests             make wheel    build the wheel and prove it elsewhere
#   make crash    kill writers at random, KILLS=200 times, and check what is left; FILE_SYSTEM=here|ext4|xfs|all
#   make simulate   run SEEDS=200 simulated worlds and check every promise; FIRST=0, WORKERS=1, OUT=result file
#   make fuzz     throw bytes at every parser for SECONDS=60
#   make e2e-vllm   the tests with a real vLLM, installed into build/vllm-env (3 GB) or VLLM_ENV=...
#   make ttft     time to first token of vLLM, and LMCache's rates, ours beside the others'; RUNS=5
#   make build    (re)build after changing c/
# PYTHON=... chooses the interpreter of a new .venv; ARGS=... is passed on.
.PHONY: e2e-vllm ttft help setup build demo test bench crash simulate wheel lint clean
.DEFAULT_GOAL := help
export PYTHON

help:
	@sed -n 's/^#   /  /p' Makefile

setup build:
	@scripts/setup.sh

demo: setup
	@.venv/bin/cascade-aio demo $(ARGS)

test: setup
	@.venv/bin/python -m pytest $(ARGS)

bench: export CASCADE_EXTRAS = dev,bench
bench: setup
	@.venv/bin/python -m bench run $(ARGS)

crash: KILLS ?= 200
crash: FILE_SYSTEM ?= all
crash: setup
	@.venv/bin/python -m cascade_aio.testing.crashes campaign --kills $(KILLS) --file-system $(FILE_SYSTEM) $(ARGS)

simulate: SEEDS ?= 200
simulate: FIRST ?= 0
simulate: WORKERS ?= 1
simulate: OUT ?= bench/results/reliability/simulation.json
simulate: setup
	@.venv/bin/python -m cascade_aio.testing.simulation run --seeds $(SEEDS) --first $(FIRST) --workers $(WORKERS) \
		--out $(OUT) $(ARGS)

e2e-vllm: setup
	@scripts/e2e_vllm.sh $(ARGS)

ttft: RUNS ?= 5
ttft: setup
	@vllm=$$(scripts/server_env.sh vllm) && lmcache=$$(scripts/server_env.sh lmcache) && \
		.venv/bin/python -m bench.inference run --vllm "$$vllm" --lmcache "$$lmcache" --runs $(RUNS) $(ARGS)

fuzz: SECONDS ?= 60
fuzz: setup
	@.venv/bin/python -m tests.fuzz --seconds $(SECONDS) $(ARGS)

wheel: setup
	@scripts/wheel.sh

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# .venv stays: `rm -r .venv` starts from nothing.
clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f .venv/cascade-setup.*.stamp
	find cascade_aio bench tests cffi_build -name __pycache__ -type d -prune -exec rm -rf {} +
