"""``python -m cascade_aio``: the command line."""

from cascade_aio.cli import main

if __name__ == "__main__":
    main()
