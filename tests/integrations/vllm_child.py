"""One vLLM engine that answers prompts named on its standard input; see ``test_vllm.py``.

    python vllm_child.py MODEL 'KV-TRANSFER-CONFIG as JSON' ['ENGINE OPTIONS as JSON']

A line ``[tokens, seed]`` asks, ``true`` or ``false`` lets the engine forget its own prefix cache, with or without the
connector's; an empty one ends. Answers are lines that begin with ``ANSWER``.
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

    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    engine = restart.make_engine(sys.argv[1], json.loads(sys.argv[2]), **options)
    print(f"{ANSWER}null", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        asked = json.loads(line)
        if isinstance(asked, bool):
            answer = engine.reset_prefix_cache(reset_connector=asked)
        else:
            answer = restart.ask(engine, restart.prompt_of(*asked))
        print(ANSWER + json.dumps(answer), flush=True)
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
