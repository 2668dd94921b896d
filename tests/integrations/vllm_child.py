"""One vLLM engine that answers prompts named on its standard input; see ``test_vllm.py``.

    python vllm_child.py MODEL 'KV-TRANSFER-CONFIG as JSON'

A line ``[tokens, seed]`` asks, an empty one ends; answers are lines that begin with ``ANSWER``.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples" / "vllm")]

ANSWER = "@answer "


def main() -> None:
    restart = importlib.import_module("restart")  # of the example, which is no package

    engine = restart.make_engine(sys.argv[1], json.loads(sys.argv[2]))
    print(f"{ANSWER}null", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        tokens, seed = json.loads(line)
        print(ANSWER + json.dumps(restart.ask(engine, restart.prompt_of(tokens, seed))), flush=True)
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
