"""How files are written: atomically and durably; large files past the page cache.

Does not know what the files contain. Imports no torch.
Entered by every room above.
"""
