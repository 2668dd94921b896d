"""What a user waits for: time to first token of a real vLLM, and LMCache's rates, ours beside the others'.

Engines run in environments of their own and never see this package: ``child.py`` is run by their interpreter.
"""
