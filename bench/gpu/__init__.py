"""The GPU tier beside the raw limits of its device: ``python -m bench.gpu``. See ``docs/gpu.md``."""
