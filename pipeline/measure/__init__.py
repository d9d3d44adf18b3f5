"""Speed of an artifact on this host: benchmarks, the best K, transformers for comparison. Buckets for given lengths.

Has no limits: the gates are in `validate`.
Entered by cli, proposal and selftest.
"""
