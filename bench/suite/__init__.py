"""The comparison of systems: ``python -m bench run --systems …``, ``install``, ``conform``, ``generate``.

The side of the suite that decides what is run when and keeps the results. Every system runs in processes of its own
(``bench.peers``), so nothing here imports one.
"""
