"""How files are written: atomically and durably, and large files past the page cache. Independent of their contents.

Imports no torch. Every room may enter.
"""
