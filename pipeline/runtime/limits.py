"""Requests that an artifact cannot run, rejected by the name of the setting before they start."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.artifact.manifest import PairManifest
from pipeline.errors import InputError
from pipeline.graphs.arguments import Choice
from pipeline.runtime.rules import Rules, check_rules

TOP_K = 2**31 - 1
"""The largest `top_k`: graphs take it as int32."""


def check_choice(manifest: PairManifest, choice: Choice) -> None:
    """Reject sampling that was not built, and settings out of range.

    Raises:
        InputError: `where` names the setting.

    """
    how = "stochastic" if choice.temperature > 0 else "greedy"
    if how not in manifest.sampling:
        built = ", ".join(manifest.sampling)
        raise InputError(
            f"{how} sampling was not built; the artifact has {built}",
            where="temperature",
            fix=f"add {how} to speculation.sampling and rebuild",
        )
    accepted = {
        "temperature": (choice.temperature >= 0, "0 (greedy) or more"),
        "top_k": (0 <= choice.top_k <= TOP_K, f"0 (all tokens) to {TOP_K}"),
        "top_p": (0 < choice.top_p <= 1, "more than 0, at most 1"),
    }
    for name, (fits, range_) in accepted.items():
        if not fits:
            raise InputError(f"found {getattr(choice, name)}", where=name, fix=f"use {range_}")
    kept = manifest.pair.candidates
    if kept is not None and choice.temperature > 0 and choice.top_k > kept:
        what = f"found {choice.top_k}; the artifact samples from the best {kept} tokens (`speculation.candidates`)"
        raise InputError(what, where="top_k", fix=f"use 1 to {kept}, or 0 for all {kept}")


def check_asked(manifest: PairManifest, rules: Rules) -> None:
    """Reject rules that the artifact's graphs cannot follow, and rules out of range.

    Raises:
        InputError: `where` names the field.

    """
    if rules.asked and "shaped" not in manifest.sampling:
        fix = "add shaped to speculation.sampling and rebuild"
        raise InputError("shaped graphs were not built", where=rules.asked[0], fix=fix)
    check_rules(rules, manifest.vocab, manifest.logprobs)


def check_prompt(manifest: PairManifest, tokens: Sequence[int], where: str) -> None:
    """Reject prompts that do not fit the caches, and ids outside the target's vocabulary.

    Raises:
        InputError: the message has the limit.

    """
    longest, last = manifest.shapes.kv[-1] - 1, manifest.vocab - 1
    if not tokens or len(tokens) > longest:
        raise InputError(
            f"{len(tokens)} tokens; the artifact takes 1 to {longest}",
            where=where,
            fix="shorten the prompt, or build with a larger kv bucket",
        )
    if strange := [token for token in tokens if not 0 <= token <= last]:
        raise InputError(
            f"token id {strange[0]}; the artifact's vocabulary has ids 0 to {last}",
            where=where,
            fix="send text, or ids of the artifact's own tokenizer",
        )
