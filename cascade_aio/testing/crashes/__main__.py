"""``python -m cascade_aio.testing.crashes``."""

from cascade_aio.testing.crashes.campaign import main

if __name__ == "__main__":
    raise SystemExit(main())
