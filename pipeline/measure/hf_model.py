"""A checkpoint as a transformers model, and its timed answers, for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pipeline.cache.local import default_root
from pipeline.graphs.dtypes import torch_dtype
from pipeline.models.quantisation import KEY
from pipeline.models.weights import D2T, EMBEDDING, HEAD
from pipeline.recipe.schema import Recipe
from pipeline.runtime.latency import Answer, ArrivalClock, TimedRequest
from pipeline.sources.checkpoint import Checkpoint, require_local
from pipeline.sources.pair import resolve_pair
from pipeline.sources.values import draft_token_ids, read_tensor
from pipeline.sources.weights import weights
from pipeline.validate.reference.skeleton import config_of, for_module


def build_model(checkpoint: Checkpoint, target: Checkpoint, dtype: str, attention: str) -> Any:
    """Return the checkpoint as a transformers model. A draft that shares its target's embedding, or has a reduced
    vocabulary, is put together from both.
    """  # fmt: skip
    config = checkpoint.config
    require_local(checkpoint)
    whole = checkpoint.layers is None and not config.shares_embedding and config.draft_vocab is None
    if whole and KEY not in checkpoint.config_json:  # transformers needs packages for some formats, or a GPU
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.root, dtype=torch_dtype(dtype), attn_implementation=attention, trust_remote_code=False
        )
        return model.eval()
    model = _without_weights(checkpoint, torch_dtype(dtype), attention)
    state = for_module(model.state_dict(), _state(checkpoint, target, torch_dtype(dtype)), config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _without_weights(checkpoint: Checkpoint, dtype: torch.dtype, attention: str) -> Any:
    config = checkpoint.config
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(checkpoint), dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    if config.draft_vocab is not None:
        model.lm_head = torch.nn.Linear(config.hidden, config.draft_vocab, bias=False, dtype=dtype)
    return model


def _state(checkpoint: Checkpoint, target: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {name: tensor.to(dtype) for name, tensor in _tensors(checkpoint) if name != D2T}
    if checkpoint.config.shares_embedding:
        state[EMBEDDING] = read_tensor(weights(target)[EMBEDDING]).to(dtype)
    if checkpoint.config.tied:
        state[HEAD] = state[EMBEDDING]
    return state


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name, ref in weights(checkpoint).items():
        yield name, read_tensor(ref)


def transformers_answers(recipe: Recipe, base: Path, max_new_tokens: int) -> dict[str, Answer]:
    """Return `generate`, and assisted generation with the same pair and K where the draft is a model, by name."""
    target, draft = resolve_pair(recipe, base=base, cache=default_root() / "sources")
    model = build_model(target, target, recipe.target.dtype, _attention(target))
    # Without the checkpoint's other settings, a repetition penalty for example, which the artifact does not apply.
    eos = list(target.config.eos_ids) or None
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos)
    answers = {"transformers generate": _answer(model, None, max_new_tokens)}
    if not draft.config.draft_kind.in_transformers:
        return answers
    assistant = build_model(draft, target, recipe.draft.dtype or recipe.target.dtype, _attention(draft))
    token_ids = draft_token_ids(draft)
    if token_ids is not None:
        assistant.lm_head = WholeHead(assistant.lm_head, token_ids, target.config.vocab)
    assistant.generation_config.num_assistant_tokens = recipe.speculation.draft_tokens[0]
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return answers | {"transformers assisted": _answer(model, assistant, max_new_tokens)}


def _attention(checkpoint: Checkpoint) -> str:
    """Return transformers' implementation of attention: its own operator of torch has no sinks."""
    return "eager" if checkpoint.config.sinks else "sdpa"


def _answer(model: Any, assistant: Any, max_new_tokens: int) -> Answer:
    def answer(tokens: list[int]) -> TimedRequest:
        prompt = torch.tensor([tokens])
        streamer = TimingStreamer(len(tokens))
        with torch.no_grad():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                assistant_model=assistant,
                streamer=streamer,
            )
        return streamer.clock.request()

    return answer


class WholeHead(torch.nn.Module):
    """The head of a reduced vocabulary with logits of the whole one, the only kind that transformers supports."""

    def __init__(self, head: torch.nn.Module, token_ids: Tensor, vocab: int) -> None:
        super().__init__()
        self.head, self.token_ids, self.vocab = head, token_ids, vocab

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits of all tokens, minus infinity for those that the head lacks."""
        logits = self.head(hidden)
        whole = logits.new_full((*logits.shape[:-1], self.vocab), -torch.inf)
        return whole.index_copy(-1, self.token_ids, logits)


class TimingStreamer:
    """A transformers streamer that keeps arrival times."""

    def __init__(self, prompt_tokens: int) -> None:
        self.clock = ArrivalClock()
        self._to_skip = prompt_tokens

    def put(self, value: Tensor) -> None:
        """Take tokens; the first are the prompt."""
        count = value.numel() - self._to_skip
        self._to_skip = 0
        if count > 0:
            self.clock.record(count)

    def end(self) -> None:
        """Do nothing: there is nothing to flush."""
