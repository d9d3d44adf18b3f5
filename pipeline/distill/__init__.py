"""Train a draft for a target that has none: the target writes, a draft learns to guess what it writes next.

Writes a folder that a recipe can name; changes no target and builds nothing. Entered by cli.
"""
