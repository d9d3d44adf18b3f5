"""Run an artifact: `load(folder)` returns an `Engine`.

Never compiles or downloads. Decides which rows and graphs run; the graphs hold all mathematics. Importing this package
imports no torch: `load` does, after it has checked that the packages are installed.
Entered by stages, validate, measure, distill, serve and cli.
"""

from typing import TYPE_CHECKING, Any

from pipeline.runtime.open import load

if TYPE_CHECKING:
    from pipeline.runtime.calls import Generation
    from pipeline.runtime.engine import Engine
    from pipeline.runtime.logprobs import TokenLogProbs
    from pipeline.runtime.rules import Rules

__all__ = ["Engine", "Generation", "Rules", "TokenLogProbs", "load"]


def __getattr__(name: str) -> Any:
    """Return a class of this room, whose module is imported on first use: it imports torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.runtime import calls, engine, logprobs, rules

    modules = {"Engine": engine, "Generation": calls, "Rules": rules, "TokenLogProbs": logprobs}
    return getattr(modules[name], name)
