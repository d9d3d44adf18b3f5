"""Run an artifact: `load(folder)` returns an `Engine`.

Never compiles or downloads. Decides which rows and graphs run; the graphs hold all mathematics.
Entered by validate, measure, distill, serve and cli.
"""

from pipeline.runtime.engine import Engine, Generation
from pipeline.runtime.open import load

__all__ = ["Engine", "Generation", "load"]
