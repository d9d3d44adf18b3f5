"""A recipe for a target that has none: ranks, dtype, buckets, K and a draft, each with its reason, as commented YAML.

Reads configs and tokenizers, never weights. Measures nothing: `measure` does.
Entered by cli.
"""
