"""Decoders as pure functions of (weights, inputs, state); one file per family reads its `config.json`.

Contains no phases, no sampling and no backend. `families.config_of` makes every `ModelConfig` of a Hugging Face config.
Entered by every room above.
"""
