"""cascade_aio: a tiered KV-cache store for LLM inference."""

from cascade_aio._version import __version__

__all__ = ["__version__"]
