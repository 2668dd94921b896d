"""Protocols between the layers: storage, byte work, eviction. No implementation, no import of one."""
