"""Speculative decoding: the phases of a pair, how drafts are accepted, how tokens are chosen.

Pure functions on tensors, independent of buckets, files and backends.
Entered by graphs, backends, runtime, validate and distill.
"""
