"""``python -m bench``."""

from __future__ import annotations

from bench.app import app

if __name__ == "__main__":
    app()
