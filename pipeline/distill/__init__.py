"""Train a draft for a target that has none: the target generates text, and a draft learns its next tokens.

Writes a folder that a recipe can use as `draft.source`. Changes no target and builds no artifact.
Entered by cli.
"""
