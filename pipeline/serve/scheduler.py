"""vLLM's scheduler, with a budget of prompt tokens for each step that depends on what runs and what waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.core.sched.scheduler import Scheduler

from pipeline.runtime.prefill_budget import PrefillBudget
from pipeline.serve.requests import RequestSlots
from pipeline.serve.settings import options

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class TandemScheduler(Scheduler):
    """Schedules running requests first, then chunks of prompts within `runtime.prefill_budget`.

    While a request runs, one prompt at most is partly read: it is the last of the running requests, so that it takes
    no budget from those before it. A prefix is shared as far as vLLM's blocks match, which depend on `cache_salt`, and
    a slot of the artifact holds its tokens.
    """

    budget: ClassVar[PrefillBudget]
    slots: ClassVar[RequestSlots]
    """Of the worker, which is in this process and starts before the scheduler."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._most: int = self.scheduler_config.max_num_batched_tokens
        self._fixed = options(self.vllm_config.additional_config).prefill_tokens

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step."""
        answering = [request for request in self.running if request.num_computed_tokens >= request.num_prompt_tokens]
        waiting = len(self.running) - len(answering) + len(self.waiting)
        self.max_num_scheduled_tokens = self._most
        if answering and waiting:
            own = sum(request.num_tokens_with_spec - request.num_computed_tokens for request in answering)
            tokens = self._fixed or self.budget.tokens(len(answering), waiting)
            self.max_num_scheduled_tokens = min(own + tokens, self._most)
        return super().schedule(throttle_prefills)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """Return the blocks of a prompt that are computed: those whose tokens a slot holds."""
        blocks, count, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        tokens = request.prompt_token_ids or []
        held = min(count, self.slots.shared(tokens) // self.block_size * self.block_size)
        if self.slots.shared(tokens[:held]) < held:  # recurrent states are those of a whole prefix
            held = 0
        if count > held:
            groups = tuple(list(group[: held // self.block_size]) for group in blocks.blocks)
            blocks, count = self.kv_cache_manager.create_kv_cache_blocks(groups), held
        return blocks, count, boundary, diverged
