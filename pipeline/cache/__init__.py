"""What builds keep to save work: compiled graphs and goldens by content, here and shared; and how it is collected.

Knows keys and bytes, not what they mean. Imports no torch. Entered by stages, validate, registry and cli.
"""
