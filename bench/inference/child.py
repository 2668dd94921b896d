"""Run by the interpreter that has vLLM, not by this checkout's: one engine, some prompts, one line of JSON.

    python child.py '{"model": DIR, "tokens": N, "seeds": [...], "transfer": {...} or null, "settle_s": S}'

Imports nothing of ``bench``. The engine and the prompts are those of ``examples/vllm/restart.py``.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

ANSWER = "@answer "
LAYERS, HIDDEN = 8, 1024


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "vllm"))
    restart = importlib.import_module("restart")
    plan = json.loads(sys.argv[1])
    restart.make_model(Path(plan["model"]), LAYERS, HIDDEN)
    engine = restart.make_engine(plan["model"], plan["transfer"])
    answers = []
    for seed in plan["seeds"]:
        answers.append(restart.ask(engine, restart.prompt_of(plan["tokens"], seed)))
        time.sleep(plan["settle_s"])  # what is stored behind one prompt must not be charged to the next
    restart.ask(engine, [11] * 64)  # one more turn of the scheduler, for what it does at a request's end
    engine.llm_engine.engine_core.shutdown()
    print(ANSWER + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
