"""The worker that vLLM drives: one per server, in the engine's own process; ranks are processes of the artifact's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.tasks import SupportedTask
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from pipeline.graphs.arguments import Choice
from pipeline.runtime.open import open_batch
from pipeline.serve.requests import Request, Requests, request
from pipeline.serve.settings import BLOCK, blocks, options

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

logger = init_logger(f"vllm.{__name__}")


class TandemWorker(WorkerBase):
    """Executes the scheduler's steps on an artifact's slots.

    vLLM's KV blocks are bookkeeping only: the caches are the artifact's, a slot for each request. There are as many
    blocks as all slots can ever fill, so that nobody waits for one and nobody is preempted.
    """

    def init_device(self) -> None:
        """Nothing: graphs run where the artifact says."""
        self.device = torch.device("cpu")
        if not torch.accelerator.is_available():  # vLLM empties its caches at the end, whether there is one or not
            torch.accelerator.empty_cache = torch.accelerator.empty_host_cache = lambda: None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Open the artifact, which the platform has verified."""
        del load_dummy_weights
        start = time.perf_counter()
        self.batch = open_batch(Path(self.model_config.model))
        self.requests = Requests(self.batch, options(self.vllm_config.additional_config).speculate_up_to)
        logger.info("tandem: opened in %.2f s", time.perf_counter() - start)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Run every graph of the serving phases once, so that no request pays for opening it. Compiles nothing."""
        start = time.perf_counter()
        opened = self.batch.warm()
        logger.info("tandem: %d graphs opened in %.2f s; compiled nothing", opened, time.perf_counter() - start)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """One layer of the smallest pages: the scheduler counts with it, nothing is allocated."""
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        return {"tandem.slots": spec}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Any: there is no cache to lay out."""
        return ["LBNHC"]

    def determine_available_memory(self) -> int:
        """Bytes of just the blocks that all slots can fill."""
        spec = self.get_kv_cache_spec()["tandem.slots"]
        return blocks(self.batch.manifest) * spec.page_size_bytes

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Nothing to allocate."""

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        """Generation only."""
        return ("generate",)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """One step: drop who is gone, prefill who is new, advance the others."""
        going_on = scheduler_output.scheduled_cached_reqs
        if going_on.resumed_req_ids:
            raise RuntimeError("vLLM preempted a request, which the settings of this platform exclude")
        self.requests.drop(scheduler_output.finished_req_ids)
        new = {one.req_id: _request(one) for one in scheduler_output.scheduled_new_reqs}
        drafts = scheduler_output.scheduled_spec_decode_tokens
        tokens = self.requests.step(new, {name: len(drafts.get(name, ())) for name in going_on.req_ids})
        self._last = list(tokens)
        return ModelRunnerOutput(
            req_ids=self._last,
            req_id_to_index={name: index for index, name in enumerate(self._last)},
            sampled_token_ids=list(tokens.values()),
        )

    def take_draft_token_ids(self) -> DraftTokenIds:
        """Placeholders for the drafts of the next step."""
        return DraftTokenIds(self._last, [[0] * self.requests.planned for _ in self._last])

    def execute_dummy_batch(self) -> None:
        """Nothing: there are no other replicas to keep company."""

    def shutdown(self) -> None:
        """End the ranks."""
        if hasattr(self, "batch"):
            self.batch.close()


def _request(one: NewRequestData) -> Request:
    params = one.sampling_params
    if params is None or one.prompt_token_ids is None:
        raise RuntimeError("a request without sampling parameters or token ids came past the platform's check")
    extra: dict[str, Any] = params.extra_args or {}
    return request(one.prompt_token_ids, choice(params), params.seed, speculate=bool(extra.get("speculate", True)))


def choice(params: SamplingParams) -> Choice:
    """Our words for vLLM's sampling parameters (its `top_k` is -1 or 0 for all tokens)."""
    return Choice(params.temperature, max(params.top_k, 0), params.top_p)
