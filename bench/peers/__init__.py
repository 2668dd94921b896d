"""The systems that are compared: one folder each, driven by one protocol, run in processes of their own.

What is in ``protocol``, ``catalog``, ``child``, ``driving``, ``content`` and ``meters`` runs inside every peer's own
virtual environment, and so does a peer's ``peer.py``: they import the standard library and NumPy, and nothing
else of this repository but each other. README.md says how a peer is written.
"""
