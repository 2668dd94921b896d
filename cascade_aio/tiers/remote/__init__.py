"""The remote tier: arenas of other ranks, read with one-sided operations. ``docs/remote.md`` is the protocol."""
