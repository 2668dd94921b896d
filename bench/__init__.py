"""How near to the limits of the machine the store comes, measured the way anyone can repeat it.

``python -m bench run`` measures, ``python -m bench table`` writes the README table from the result
file. Not shipped in the wheel. The engine never imports it, and it uses the engine through its
public interface only; what it needs beyond (the native ring, the segment format) is named in the
module that uses it: ``raw_ring``, ``copies`` and ``synthetic``.
"""
