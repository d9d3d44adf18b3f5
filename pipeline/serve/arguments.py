"""vLLM's engine arguments: an argument that has no effect with an artifact ends the start. Imports no vLLM.

The artifact fixes shapes, caches, parallelism, quantization and compilation, each request its seed. Such an argument
may be given with the value that holds anyway. Considered: a comparison of vLLM's finished configuration, which cannot
tell a given argument from a default.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any

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

Refuse = Callable[[InputError], None]
"""Ends the start of the server."""


def restrict(parser: argparse.ArgumentParser, engine: Collection[str], refuse: Refuse) -> None:
    """Let a parser refuse each argument of the engine that is given, has no effect, and is not what holds anyway.

    The defaults of the parser are the artifact's. Values in a file of `--config` count as given, too.
    """
    no_string(engine, "engine", "arguments")
    for action in parser._actions:  # noqa: SLF001 - argparse has no other list
        if action.dest in engine and action.dest not in SUPPORTED:
            action.__class__ = _strict(type(action), refuse)


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
