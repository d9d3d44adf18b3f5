"""The artifact: a directory whose manifest lists every file. Manifest, verification, signing, provenance, comparison.

Builds, runs and publishes nothing. Imports no torch.
Entered by every room above.
"""
