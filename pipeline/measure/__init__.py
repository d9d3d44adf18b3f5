"""Speed of an artifact on this host: benchmarks, the best K and buckets, transformers for comparison.

Has no limits: the gates are in `validate`.
Entered by cli.
"""
