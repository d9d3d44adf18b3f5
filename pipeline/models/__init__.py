"""Decoders as pure functions of (weights, inputs, state); one file a family says how its `config.json` is read.

`families.config_of` is the only door from a Hugging Face config to a `ModelConfig`. Knows no phases and no sampling.
"""
