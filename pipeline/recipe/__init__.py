"""Recipes: the schema of the YAML file, its checks, and what a change in the repository concerns.

Needs no weights and no device. Imports no torch. Every room above may enter.
"""

from pipeline.recipe.schema import Recipe, find, load

__all__ = ["Recipe", "find", "load"]
