"""vLLM's data and ours: sampling parameters as `Choice` and `Rules`, masks of grammars, log probabilities.

Shapes: P requests, M tokens of a step, T positions of a request, N most probable tokens, W words of a bit per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from pipeline.errors import InputError
from pipeline.files.limits import parse_json
from pipeline.graphs.arguments import Choice
from pipeline.runtime.logprobs import TokenLogProbs
from pipeline.runtime.rules import Rules
from pipeline.serve.requests import Step

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import GrammarOutput


def choice(params: SamplingParams) -> Choice:
    """Return vLLM's sampling parameters as a `Choice`; vLLM's `top_k` is -1 or 0 for all tokens."""
    return Choice(params.temperature, max(params.top_k, 0), params.top_p)


def rules_of(params: SamplingParams) -> Rules:
    """Return vLLM's sampling parameters as `Rules`; the masks of a grammar come with each step.

    vLLM 0.32 itself rejects `min_p` and `logit_bias` where steps speculate, so a request may have them as extra
    arguments too, the biases as the text of a JSON object.

    Raises:
        InputError: an extra argument of another type.

    """
    extra = params.extra_args or {}
    bias = params.logit_bias or _extra_bias(extra.get("logit_bias", "{}"))
    allowed = params.allowed_token_ids
    return Rules(
        min_p=params.min_p or _extra_number(extra.get("min_p", 0.0)),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=tuple((int(token), float(value)) for token, value in bias.items()),
        allowed_token_ids=None if allowed is None else tuple(allowed),
        bad_words=tuple(map(tuple, params.bad_words_token_ids or ())),
        min_tokens=params.min_tokens,
        logprobs=params.logprobs,
    )


def _extra_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"found {value!r}", where="min_p", fix="use a number from 0 to 1")
    return float(value)


def _extra_bias(value: object) -> dict[str, float]:
    fix = 'write the text of an object: "{\\"50\\": -100}"'
    try:
        found = parse_json(str(value))
        return {str(int(token)): float(bias) for token, bias in found.items()}
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise InputError(f"found {value!r}", where="logit_bias", fix=fix) from error


def masks(found: GrammarOutput | None, drafts: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return what grammars allow before and after each draft of their requests: int32 [drafts + 1, W]."""
    if found is None:
        return {}
    allowed, first = {}, 0
    for name in found.structured_output_request_ids:
        last = first + len(drafts.get(name, ())) + 1
        allowed[name] = torch.from_numpy(found.grammar_bitmask[first:last].copy())
        first = last
    return allowed


def logprobs_lists(step: Step) -> LogprobsLists:
    """Return a step's log probabilities, of all its tokens: zeros for requests that do not ask for them."""
    width = 1 + max(len(each.top) for found in step.logprobs.values() for each in found)
    nothing = TokenLogProbs(0, 0.0, 0, ())
    rows, begins = [], [0]
    for name, tokens in step.tokens.items():
        rows += [*step.logprobs.get(name, ()), *[nothing] * len(tokens)][: len(tokens)]
        begins.append(len(rows))
    ids, values = _columns(rows, width)
    return LogprobsLists(ids, values, np.array([row.rank for row in rows], dtype=np.int64), begins)


def prompt_tensors(found: Sequence[TokenLogProbs]) -> LogprobsTensors:
    """Return the log probabilities of a prompt's tokens but the first."""
    ids, values = _columns(found, 1 + max((len(each.top) for each in found), default=0))
    ranks = torch.tensor([each.rank for each in found], dtype=torch.int64)
    return LogprobsTensors(torch.from_numpy(ids), torch.from_numpy(values), ranks)


def _columns(rows: Sequence[TokenLogProbs], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int64 and log probabilities float32, [M, width]: each token's own first, then the most probable."""
    ids, values = np.zeros((len(rows), width), dtype=np.int64), np.full((len(rows), width), -np.inf, dtype=np.float32)
    for place, row in enumerate(rows):
        pairs = [(row.token, row.logprob), *row.top]
        ids[place, : len(pairs)] = [token for token, _ in pairs]
        values[place, : len(pairs)] = [value for _, value in pairs]
    return ids, values
