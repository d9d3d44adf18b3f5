"""Backends: toolchains that trace, compile and open graphs. `base.py` is the contract; one folder per backend.

Knows no requests, no tokens as text and no gates. Backends never import each other.
Entered by every room above.
"""
