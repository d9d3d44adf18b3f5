"""The artifact: a directory whose manifest lists every file. Manifest, verification, signing, provenance, comparison.

Knows how an artifact lies on disk; builds, runs and publishes nothing. Imports no torch. Every room above may enter.
"""
