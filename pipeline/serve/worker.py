"""vLLM's worker for an artifact: one per server, in the engine's process; each rank of the artifact is a process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.tasks import SupportedTask
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from pipeline.runtime.open import open_batch
from pipeline.runtime.prefill_budget import measured_budget
from pipeline.runtime.rules import RuleState
from pipeline.serve.parameters import choice, logprobs_lists, masks, prompt_tensors, rules_of
from pipeline.serve.parent import end_with_parent
from pipeline.serve.requests import RequestSlots, ServedRequest, served_request, wants_drafts
from pipeline.serve.scheduler import TandemScheduler
from pipeline.serve.settings import BLOCK, SALT, VERIFIED, blocks, options

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput

logger = init_logger(f"vllm.{__name__}")


class TandemWorker(WorkerBase):
    """Executes the scheduler's steps on an artifact's slots.

    vLLM's KV blocks are bookkeeping only: the artifact holds the caches, a slot for each request. There are as many
    blocks as all slots can fill, so that no request waits for a block or is preempted.
    """

    def init_device(self) -> None:
        """Set vLLM's device to the CPU: the artifact decides where graphs run."""
        end_with_parent()
        self.device = torch.device("cpu")
        if not torch.accelerator.is_available():  # vLLM empties an accelerator's caches at its end
            torch.accelerator.empty_cache = torch.accelerator.empty_host_cache = lambda: None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Open the artifact; the platform has verified it."""
        del load_dummy_weights
        start = time.perf_counter()
        self.batch = open_batch(Path(self.model_config.model), os.environ[VERIFIED])
        asked = options(self.vllm_config.additional_config)
        self.batch.remember_answers(asked.remember_tokens)
        self.requests = RequestSlots(self.batch, asked.speculate_up_to)
        logger.info("tandem: opened in %.2f s", time.perf_counter() - start)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Run every graph of the serving phases once, so that no request waits for opening it. Compiles nothing."""
        start = time.perf_counter()
        opened = self.batch.warm()
        TandemScheduler.budget, TandemScheduler.slots = measured_budget(self.batch), self.requests
        logger.info("tandem: %d graphs opened in %.2f s; compiled nothing", opened, time.perf_counter() - start)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Return one layer of the smallest pages, for the scheduler's counts; nothing is allocated."""
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        return {"tandem.slots": spec}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Return one layout; vLLM has no cache to lay out."""
        return ["LBNHC"]

    def determine_available_memory(self) -> int:
        """Return the bytes of the blocks that all slots can fill."""
        spec = self.get_kv_cache_spec()["tandem.slots"]
        return blocks(self.batch.manifest) * spec.page_size_bytes

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """No-op: the artifact holds the caches."""

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        """Return text generation only."""
        return ("generate",)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Take one step: drop finished requests, read prompts or chunks of them, advance running requests.

        Returns None, and takes the step in `sample_tokens`, if a request has a grammar.
        """
        if scheduler_output.has_structured_output_requests:  # the scheduler computes their grammars' masks meanwhile
            self._waiting = scheduler_output
            return None
        return self._step(scheduler_output, {})

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """Take the step of `execute_model`, with the masks of grammars."""
        return self._step(self._waiting, masks(grammar_output, self._waiting.scheduled_spec_decode_tokens))

    def _step(self, scheduler_output: SchedulerOutput, allowed: dict[str, torch.Tensor]) -> ModelRunnerOutput:
        running = scheduler_output.scheduled_cached_reqs
        if running.resumed_req_ids:
            raise RuntimeError("vLLM preempted a request, although every slot has blocks")
        self.requests.drop(scheduler_output.finished_req_ids)
        new = {data.req_id: _request(data, self.batch.manifest.vocab) for data in scheduler_output.scheduled_new_reqs}
        drafts, scheduled = scheduler_output.scheduled_spec_decode_tokens, scheduler_output.num_scheduled_tokens
        computed = {data.req_id: data.num_computed_tokens for data in scheduler_output.scheduled_new_reqs}
        computed |= dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
        reading = {
            name: read + scheduled[name]
            for name, read in computed.items()
            if name in new or self.requests.is_reading(name)
        }
        advancing = {name: len(drafts.get(name, ())) for name in running.req_ids if name not in reading}
        step = self.requests.step(new, advancing, allowed, reading)
        self._last = list(step.tokens)
        return ModelRunnerOutput(
            req_ids=self._last,
            req_id_to_index={name: index for index, name in enumerate(self._last)},
            sampled_token_ids=list(step.tokens.values()),
            logprobs=logprobs_lists(step) if step.logprobs else None,
            prompt_logprobs_dict={name: prompt_tensors(found) for name, found in step.prompts.items()},
        )

    def take_draft_token_ids(self) -> DraftTokenIds:
        """Return the drafts of the next step: a grammar checks them; for other requests, placeholders may do."""
        return DraftTokenIds(self._last, [self.requests.drafts(name) for name in self._last])

    def execute_dummy_batch(self) -> None:
        """No-op: there are no other replicas."""

    def shutdown(self) -> None:
        """End the ranks."""
        if hasattr(self, "batch"):
            self.batch.close()


def _request(data: NewRequestData, vocab: int) -> ServedRequest:
    params = data.sampling_params
    if params is None or data.prompt_token_ids is None:
        raise RuntimeError("the platform accepted a request without sampling parameters or token ids")
    extra: dict[str, Any] = params.extra_args or {}
    rules, tokens = rules_of(params), data.prompt_token_ids
    state = None
    if rules.asked or params.structured_outputs is not None:
        state = RuleState(rules, tokens, vocab, sorted(params.all_stop_token_ids))
    request = served_request(
        tokens, choice(params), params.seed, speculate=wants_drafts(extra.get("speculate", True)), rules=state,
        prompt_logprobs=params.prompt_logprobs, shared=data.num_computed_tokens,
    )  # fmt: skip
    request.tenant = str(extra.get(SALT, ""))
    return request
