"""Backends: toolchains that trace, compile and open graphs. `base.py` is the contract; one folder per backend.

Independent of requests, text and gates. Backends never import each other.
Entered by every room above.
"""
