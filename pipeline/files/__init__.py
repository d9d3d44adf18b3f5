"""Writing of files: atomic and durable; large files bypass the page cache. Folders: homes, and for temporary files.
The reader of JSON lines.

Otherwise independent of the contents of files. Imports no torch.
Entered by every room above.
"""
