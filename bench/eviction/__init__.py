"""Hit rates of eviction policies on traces: ``python -m bench.eviction run`` and ``… table``.

Deterministic and without I/O on blocks, so apart from the engine's benchmark: no repetitions, no
machine in the result but for the time it took.
"""
