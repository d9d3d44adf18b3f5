"""Writing of files: atomic and durable; large files bypass the page cache.

Independent of the contents of files. Imports no torch.
Entered by every room above.
"""
