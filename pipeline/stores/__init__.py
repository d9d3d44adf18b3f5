"""The stores that hold releases: one contract (`base.py`), one file per kind: folder, S3, Hub.

Moves bytes. The meaning of a release and the order of writes belong to `registry`. Imports no torch.
Entered by cache, registry and cli.
"""
