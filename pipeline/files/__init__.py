"""Writing of files: atomic and durable; large files bypass the page cache. Folders: homes, and for temporary files.
The reader of JSON lines, and limits for documents of strangers.

Otherwise independent of the contents of files. Imports no torch.
Entered by every room above.
"""
