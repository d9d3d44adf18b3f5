"""Recipes: the schema of the YAML file, its checks, and which recipes a change in the repository affects.

Needs no weights and no device. Imports no torch. Every room above may enter.
"""

from pipeline.recipe.read import find, load
from pipeline.recipe.schema import Recipe

__all__ = ["Recipe", "find", "load"]
