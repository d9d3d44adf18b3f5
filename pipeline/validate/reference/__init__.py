"""References: what transformers computes for a sequence, layer by layer, and the goldens kept of it.

Runs no graph of an artifact.
Entered by `validate.gates`.
"""
