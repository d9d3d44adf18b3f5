"""vLLM's platform for artifacts: takes its settings from the manifest, and rejects arguments that contradict it."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from pipeline.artifact.manifest import PairManifest
from pipeline.errors import InputError, TandemError
from pipeline.memory import host_memory
from pipeline.models.generation import not_applied_warning
from pipeline.runtime.limits import check_asked, check_choice, check_prompt
from pipeline.serve import settings
from pipeline.serve.arguments import restrict, without_usage
from pipeline.serve.plugin import ARTIFACT

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.inputs import EngineInput
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = init_logger(f"vllm.{__name__}")

WORKER = "pipeline.serve.worker.TandemWorker"
SCHEDULER = "pipeline.serve.scheduler.TandemScheduler"

UNSUPPORTED: dict[str, Any] = {
    "thinking_token_budget": None, "prompt_logprob_token_ids": None, "logprob_token_ids": None,
    "trace_decode_token_ids": None, "watermarking": None,
}  # fmt: skip
"""Fields of a request that no graph supports, and their defaults."""

SHAPED: dict[str, Any] = settings.UNSUPPORTED_DEFAULTS | {
    "min_tokens": 0, "logprobs": None, "logit_bias": None, "allowed_token_ids": None, "bad_words": None,
    "structured_outputs": None,
}  # fmt: skip
"""Fields of a request that shaped graphs support, and their defaults."""


class TandemPlatform(Platform):
    """Serves the artifact in `TANDEM_ARTIFACT`. The artifact selects the device; vLLM's device is the CPU."""

    _enum = PlatformEnum.OOT
    device_name = "tandem"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"

    _parser_has_defaults = False

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """Dtypes of artifacts."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def import_kernels(cls) -> None:
        """No-op: vLLM's kernels are not used."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Return a name for logs."""
        del device_id
        return "tandem"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Return the memory of the host or its container, in bytes."""
        del device_id
        return host_memory().total

    @classmethod
    def inference_mode(cls) -> Any:
        """Return no-grad, because graphs update their state in place."""
        return torch.no_grad()

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """No-op: each request has its own generator."""

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """Return False: vLLM copies nothing to a device."""
        return False

    @classmethod
    def pre_register_and_update(cls, parser: FlexibleArgumentParser | None = None) -> None:
        """Make the artifact's values the defaults of the command line; verify the artifact before vLLM starts."""
        if parser is None:
            return
        root = Path(os.environ[ARTIFACT])
        try:
            manifest = settings.checked(root)
        except TandemError as error:
            _end(error)
        from vllm.engine.arg_utils import AsyncEngineArgs  # here: this module calls this function

        parser.set_defaults(**settings.of_vllm(root, manifest))
        without_usage(parser, _end)
        restrict(parser, [field.name for field in fields(AsyncEngineArgs)], _end)
        cls._parser_has_defaults = True

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Set vLLM's configuration to the artifact's values.

        Raises:
            SystemExit: after one line, with the error's code: the artifact cannot be served, or a flag contradicts it.

        """
        if vllm_config.parallel_config.worker_cls == WORKER:
            return  # vLLM calls this again in its engine's process, with this configuration
        root = Path(vllm_config.model_config.model)
        try:
            manifest = settings.checked(root)
            settings.check_options(vllm_config.additional_config, manifest)
            _check_arguments(vllm_config, settings.of_vllm(root, manifest), explicit=cls._parser_has_defaults)
            _set_request_defaults(vllm_config.model_config, manifest)
        except TandemError as error:
            _end(error)
        _configure(vllm_config, manifest)

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: VllmConfig) -> None:
        """No-op: blocks are bookkeeping, and no attention backend uses them."""

    @classmethod
    def check_runner_kv_caches_multi_layer(cls) -> None:
        """No-op: vLLM has no KV caches."""

    @classmethod
    def validate_request(cls, processed_inputs: EngineInput, params: SamplingParams | PoolingParams) -> None:
        """Check a request against the graphs' features; vLLM answers an error with status 400.

        Raises:
            VLLMValidationError: with the field, in one line.

        """
        from vllm.sampling_params import SamplingParams  # imported here: vLLM selects its platform during its import

        from pipeline.serve.parameters import choice, rules_of
        from pipeline.serve.requests import wants_drafts  # here, as above

        if not isinstance(params, SamplingParams):
            raise VLLMValidationError("unsupported by this artifact: pooling and embedding")
        manifest = settings.checked(Path(os.environ[ARTIFACT]))
        for name, unset in (UNSUPPORTED if "shaped" in manifest.sampling else UNSUPPORTED | SHAPED).items():
            if (value := getattr(params, name)) not in (unset, [], {}):
                what = (
                    f"{name}: found {settings.sent(name, value)}; unsupported by the artifact's graphs. Remove {name}"
                )
                raise VLLMValidationError(what, parameter=name)
        try:
            check_asked(manifest, rules_of(params))
            check_prompt(manifest, _token_ids(processed_inputs), "prompt")
            check_choice(manifest, choice(params))
            wants_drafts((params.extra_args or {}).get("speculate", True))
            params.extra_args = settings.with_salt(params.extra_args, processed_inputs)
        except InputError as error:
            raise VLLMValidationError(f"{error.where}: {error.what}; {error.fix}", parameter=error.where) from error


def _token_ids(inputs: Any) -> list[int]:
    token_ids = inputs.get("prompt_token_ids") if isinstance(inputs, dict) else None
    if token_ids is None:
        what = "prompt: unsupported by this artifact: embeddings and media other than text"
        raise VLLMValidationError(what, parameter="prompt")
    return list(token_ids)


def _check_arguments(config: VllmConfig, values: dict[str, Any], *, explicit: bool) -> None:
    """Raise an error for an argument that contradicts the artifact; without a parser, arguments are not `explicit`."""
    limits = {
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
    }
    for name, value in limits.items():
        if explicit and value > values[name]:
            raise _contradiction(name, value, f"at most {values[name]}")
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if explicit and dtype != values["dtype"]:
        raise _contradiction("dtype", dtype, values["dtype"])
    unsupported = {
        "speculative_config": config.speculative_config,
        "quantization": config.model_config.quantization,
        "enable_lora": config.lora_config,
        "kv_transfer_config": config.kv_transfer_config,
    }
    for name, setting in unsupported.items():
        if setting is not None:
            raise _contradiction(name, setting, "no such setting; the recipe fixes it at build time")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if (size := getattr(config.parallel_config, name)) != 1:
            raise _contradiction(name, size, "1: its ranks are separate processes")


def _contradiction(name: str, value: object, accepted: str) -> InputError:
    flag = "--" + name.replace("_", "-")
    return InputError(f"found {value}; the artifact has {accepted}", where=flag, fix=f"remove {flag}")


def _set_request_defaults(config: ModelConfig, manifest: PairManifest) -> None:
    """Replace defaults of requests that the graphs do not support, and log them, so that requests are not rejected."""
    checkpoint = {} if config.generation_config == "vllm" else config.try_get_generation_config()
    asked = config.override_generation_config
    replaced = settings.request_defaults(checkpoint, asked, manifest.sampling)
    config.override_generation_config = {**replaced.values, **asked}
    if replaced.left_out:
        warning = not_applied_warning(replaced.left_out, by="vLLM without Tandem")
        logger.warning("tandem: %s", warning.removeprefix("warning: "))


def _configure(config: VllmConfig, manifest: Any) -> None:
    """Write the artifact's values into vLLM's configuration."""
    from vllm.config import CompilationMode, CUDAGraphMode, SpeculativeConfig  # here, as above

    slots, most = manifest.shapes.batch[-1], settings.most_tokens(manifest)
    config.model_config.max_model_len = min(config.model_config.max_model_len, most)
    config.scheduler_config.max_model_len = config.model_config.max_model_len
    config.scheduler_config.max_num_seqs = min(config.scheduler_config.max_num_seqs, slots)
    # A step may prefill every slot at once; beside running requests, the scheduler has prompts read in chunks.
    config.scheduler_config.max_num_batched_tokens = slots * most
    config.scheduler_config.enable_chunked_prefill = True
    config.scheduler_config.scheduler_cls = SCHEDULER
    config.scheduler_config.async_scheduling = False
    config.cache_config.block_size = settings.BLOCK
    config.cache_config.num_gpu_blocks_override = settings.blocks(manifest)
    config.parallel_config.worker_cls = WORKER
    config.parallel_config.distributed_executor_backend = "uni"
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    # vLLM's scheduler and metrics count drafts only with this setting; its proposer is not loaded.
    config.speculative_config = SpeculativeConfig(
        method="custom_class",
        model=WORKER,
        num_speculative_tokens=max(manifest.draft_tokens),
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )


def _end(error: TandemError) -> NoReturn:
    """End the start of the server with one line and the exit code of the error's kind."""
    sys.stderr.write(f"{_line(error)}\n")
    raise SystemExit(error.exit_code) from error


def _line(error: TandemError) -> str:
    where = f"{error.where}: " if error.where else ""
    return f"tandem: {where}{error.what}" + (f"; {error.fix}" if error.fix else "")
