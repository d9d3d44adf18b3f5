"""NxD Inference's part of a build: trace, compile and shard one fused pair, in a separate process.

    python -m pipeline.nxdi.compile ORDER.json

It sets environment variables, empties its work folder, and may end the process, so it runs in a separate process.
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
from pipeline.nxdi.config import NxdiSettings


@dataclass(frozen=True)
class CompileOrder:
    """One pair to compile: settings, folders of both checkpoints, output folder, and the file for compiler flags."""

    settings: NxdiSettings
    target: str
    draft: str
    out: str
    flags: str

    def dump(self) -> bytes:
        """Return the order as JSON."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def parse(data: bytes) -> CompileOrder:
        """Return the order in `data`, which `dump` wrote."""
        fields = json.loads(data)
        return CompileOrder(**{**fields, "settings": NxdiSettings(**fields["settings"])})


def compile_pair(order: CompileOrder) -> dict[str, str]:
    """Write `model.pt`, `neuron_config.json` and `weights/`; return the compiler flags of each submodel by its tag."""
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig  # here: not installed by Tandem

    settings = order.settings
    application, draft_application = _application(settings.application), _application(settings.draft_application)
    config = _config(application, settings.neuron_config, order.target)
    config.fused_spec_config = FusedSpecNeuronConfig(
        application._model_cls,  # noqa: SLF001 - how NxD Inference's own demo names it
        draft_config=_config(draft_application, settings.draft_neuron_config, order.draft),
        draft_model_path=order.draft,
        draft_model_cls=draft_application,
    )
    pair = application(order.target, config)
    pair.compile(order.out)
    return {str(submodel.tag): str(submodel.compiler_args) for submodel in pair.models}


def _application(path: tuple[str, str]) -> Any:
    """Return a class of NxD Inference by module and name."""
    module, name = path
    return getattr(import_module(module), name)


def _config(application: Any, settings: dict[str, Any], checkpoint: str) -> Any:
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config  # here, as above

    neuron = application.get_neuron_config_cls()(**settings)
    return application.get_config_cls()(neuron, load_config=load_pretrained_config(checkpoint))


if __name__ == "__main__":
    this_order = CompileOrder.parse(Path(sys.argv[1]).read_bytes())
    write_atomic(Path(this_order.flags), json.dumps(compile_pair(this_order)).encode())
