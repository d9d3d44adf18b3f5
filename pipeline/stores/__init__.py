"""The stores that hold releases: one contract (`base.py`), one file per kind: folder, S3, Hub, and an archive.

Transfers bytes. `registry` defines the contents of a release and the order of writes. Imports no torch.
Entered by sources, cache, registry, stages and cli.
"""
