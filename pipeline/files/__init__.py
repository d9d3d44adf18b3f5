"""How files are written: whole or not at all, durable, and large ones past the page cache. Knows nothing of contents.

Imports no torch. Every room may enter.
"""
