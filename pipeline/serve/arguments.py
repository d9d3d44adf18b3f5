"""vLLM's arguments: one that is wrong, or has no effect with an artifact, ends the start in one line. Imports no vLLM.

The artifact fixes shapes, caches, parallelism, quantization and compilation, each request its seed. Such an argument
may be given with the value that holds anyway. Considered: a comparison of vLLM's finished configuration, which cannot
tell a given argument from a default.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any, NoReturn

from pipeline.errors import SHOWN_CHARACTERS, InputError, no_string

SUPPORTED = frozenset({
    "model", "served_model_name", "max_model_len", "max_num_seqs", "additional_config", "generation_config",
    "enable_prefix_caching",
    "override_generation_config", "max_logprobs", "structured_outputs_config", "reasoning_parser",
    "reasoning_parser_plugin", "scheduling_policy", "max_num_queued_reqs", "max_num_queued_tokens", "shutdown_timeout",
    "fail_on_environ_validation",
    "disable_log_stats", "aggregate_engine_logging", "enable_log_requests", "enable_logging_iteration_details",
    "logging_config", "log_level", "log_config_file", "otlp_traces_endpoint", "show_hidden_metrics_for_version",
    "custom_histogram_buckets", "per_request_spec_decode_metrics", "renderer_num_workers",
})  # fmt: skip
"""Engine arguments that do what they say; the first two limits may lower those of the artifact."""

HOLDS: dict[str, Any] = {"enable_chunked_prefill": True, "async_scheduling": False, "block_size": 16}
"""Values that hold with every artifact, of arguments whose default is that vLLM chooses."""

Refuse = Callable[[InputError], NoReturn]
"""Ends the start of the server."""

HELP = "see vLLM's options: tandem serve ARTIFACT -- --help=all"


def restrict(parser: argparse.ArgumentParser, engine: Collection[str], refuse: Refuse) -> None:
    """Let a parser refuse each argument of the engine that is given, has no effect, and is not what holds anyway.

    The defaults of the parser are the artifact's. Values in a file of `--config` count as given, too.
    """
    no_string(engine, "engine", "arguments")
    for action in parser._actions:  # noqa: SLF001 - argparse has no other list
        if action.dest in engine and action.dest not in SUPPORTED:
            action.__class__ = _strict(type(action), refuse)


def without_usage(parser: argparse.ArgumentParser, refuse: Refuse) -> None:
    """Let a parser end with one error at a wrong argument: vLLM's usage, which comes first, fills three screens."""

    def error(message: str) -> NoReturn:
        refuse(_wrong(message, parser))

    parser.error = error  # type: ignore[method-assign]


def _wrong(message: str, parser: argparse.ArgumentParser) -> InputError:
    """Return argparse's message as an error: the argument, what is wrong, what to do."""
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        argument = unknown[1].partition("=")[0]  # its value may be a secret
        known = [word for action in parser._actions for word in action.option_strings]  # noqa: SLF001
        near = get_close_matches(argument, known, n=1, cutoff=0.75)
        fix = f"did you mean {near[0]}?" if near else HELP
        return InputError("neither tandem serve nor vLLM has it", where=argument, fix=fix)
    if found := re.match(r"argument ([^\s:/]+)\S*: (.*)", message, re.DOTALL):
        return InputError(found[2], where=found[1], fix=HELP)
    return InputError(message, where="vLLM's arguments", fix=HELP)


def _strict(kind: type[argparse.Action], refuse: Refuse) -> type[argparse.Action]:
    """Return a kind of argument that refuses another value than the default, when it is given."""

    class Strict(kind):  # type: ignore[valid-type, misc]
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            super().__call__(parser, namespace, values, option_string)
            found = getattr(namespace, self.dest)
            holds = HOLDS.get(self.dest, self.default)
            if found not in (self.default, holds):
                flag = option_string or f"--{self.dest.replace('_', '-')}"
                has = "no such setting" if holds is None else str(holds)[:SHOWN_CHARACTERS]
                what = f"found {str(found)[:SHOWN_CHARACTERS]}; no effect with an artifact, which has {has}"
                refuse(InputError(what, where=flag, fix=f"remove {flag}"))

    return Strict
