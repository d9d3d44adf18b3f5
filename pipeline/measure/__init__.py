"""How fast an artifact is on this host: benchmarks, the best K and buckets, transformers for comparison.

Judges nothing: the gates are in `validate`.
Entered by cli.
"""
