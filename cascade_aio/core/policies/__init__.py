"""Our best eviction policy and its parts. See ``docs/eviction.md`` for what was tried and measured.

``hit_density``: the policy; ``queues``: evictable nodes by class and age; ``kinds``, ``ages``: classes and
ages; ``reuse``: how long blocks of a class stay unused, learnt from a sample; ``density``: what that makes
them worth; ``orders``: from that to an order of eviction; ``duel``: whether a simpler order would do better;
``ghosts``: what is remembered of evicted blocks. All of it is pure and deterministic.
"""

from __future__ import annotations

from cascade_aio.core.policies.hit_density import HitDensity

__all__ = ["HitDensity"]
