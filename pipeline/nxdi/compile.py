"""NxD Inference's part of a package: trace, compile and shard one fused pair. Runs as a process of its own.

    python -m pipeline.nxdi.compile REQUEST

It sets environment variables, empties its work folder, and may end the process, so nothing else shares one with it.
Follows inference_demo and vLLM's classic loader (`_init_fused_spec_config`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.files.atomic import write_atomic
from pipeline.nxdi.config import Package


@dataclass(frozen=True)
class Request:
    """What to compile: the configuration, both checkpoints, where the package goes, and where to tell how it went."""

    package: Package
    target: str
    draft: str
    out: str
    answer: str

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def parse(data: bytes) -> Request:
        """From JSON."""
        fields = json.loads(data)
        return Request(**{**fields, "package": Package(**fields["package"])})


def compile_pair(request: Request) -> dict[str, str]:
    """Write `model.pt`, `neuron_config.json` and `weights/`; returns the compiler flags of each submodel by its tag."""
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

    made = request.package
    application, draft_application = _application(made.application), _application(made.draft_application)
    config = _config(application, made.neuron_config, request.target)
    config.fused_spec_config = FusedSpecNeuronConfig(
        application._model_cls,  # noqa: SLF001 - how NxD Inference's own demo names it
        draft_config=_config(draft_application, made.draft_neuron_config, request.draft),
        draft_model_path=request.draft,
        draft_model_cls=draft_application,
    )
    pair = application(request.target, config)
    pair.compile(request.out)
    return {str(one.tag): str(one.compiler_args) for one in pair.models}


def _application(place: tuple[str, str]) -> Any:
    module, name = place
    return getattr(import_module(module), name)


def _config(application: Any, settings: dict[str, Any], checkpoint: str) -> Any:
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    neuron = application.get_neuron_config_cls()(**settings)
    return application.get_config_cls()(neuron, load_config=load_pretrained_config(checkpoint))


if __name__ == "__main__":
    asked = Request.parse(Path(sys.argv[1]).read_bytes())
    write_atomic(Path(asked.answer), json.dumps(compile_pair(asked)).encode())
