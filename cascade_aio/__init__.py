"""cascade_aio: a tiered KV-cache store for LLM inference."""
