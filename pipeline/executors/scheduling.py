"""Which jobs of a cluster start first, which are slow, and what no node has. Pure; runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from pipeline.executors.base import Task

Resources = Mapping[str, float]
"""Amounts by name, as Ray names them."""

SLOW = 4.0
"""A job that takes this many times its expected time is slow."""
SLOW_S = 120.0
"""Least time after which a job counts as slow: estimates of short jobs are inexact."""
WORDS = {"CPU": "cores", "GPU": "GPUs"}


def longest_first(tasks: Sequence[Task]) -> list[int]:
    """Return the indices of tasks in the order in which they start."""
    return sorted(range(len(tasks)), key=lambda index: -tasks[index].seconds)


def missing(needs: Resources, nodes: Sequence[Resources]) -> str:
    """Return in words what the nearest of the nodes lacks of the resources; empty if a node has all."""
    lacking = [{name: n for name, n in needs.items() if n > node.get(name, 0.0)} for node in (*nodes, {})]
    return ", ".join(_words(name, amount) for name, amount in min(lacking, key=len).items())


def is_slow(elapsed_s: float, estimate_s: float, slower: Sequence[float]) -> bool:
    """Return whether a job takes far longer than its estimate, corrected by the ended jobs (`slower`: their ratios)."""
    return bool(slower) and elapsed_s > max(SLOW_S, SLOW * estimate_s * median(slower))


def _words(name: str, amount: float) -> str:
    return f"memory: {amount / (1 << 30):.1f} GiB" if name == "memory" else f"{WORDS.get(name, name)}: {amount:g}"
