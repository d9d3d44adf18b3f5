"""Run an artifact: `load(folder)` gives an `Engine`. Never compiles, never downloads.

Decides which rows and graphs run; the graphs hold all mathematics. Entered by validate, measure, distill and serve.
"""

from pipeline.runtime.engine import Engine, Generation
from pipeline.runtime.open import load

__all__ = ["Engine", "Generation", "load"]
