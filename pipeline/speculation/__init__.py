"""Speculative decoding: the four phases of a pair, how drafts are accepted, how tokens are chosen.

Pure functions on tensors. Knows no buckets, no files and no backend.
Entered by graphs, backends and distill.
"""
