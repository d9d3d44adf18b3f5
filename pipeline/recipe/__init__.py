"""Recipes: the schema of the YAML file, its checks, its text, and which recipes a change of files affects.

Needs no weights and no device. Imports no torch.
Entered by every room above.
"""

from pipeline.recipe.read import find, load, located
from pipeline.recipe.schema import Recipe

__all__ = ["Recipe", "find", "load", "located"]
