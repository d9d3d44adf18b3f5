"""An application: compiled once into a folder, loaded from it."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from neuronx_distributed_inference.models.config import InferenceConfig

MODEL = "model.pt"


class Compiled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class NeuronApplicationBase:
    _model_cls: type

    def __init__(self, model_path, config=None):
        self.model_path = os.path.join(os.path.normpath(model_path), "")
        self.config = config or self.get_config_cls().load(self.model_path)
        fused = self.config.fused_spec_config
        if fused is not None and fused.draft_config.neuron_config.torch_dtype != self.config.neuron_config.torch_dtype:
            raise ValueError("cast-type must be set to 'as-declared'")
        tags = ["context_encoding_model", "fused_speculation_model" if fused else "token_generation_model"]
        lnc = self.config.neuron_config.logical_nc_config
        self.models = [SimpleNamespace(tag=tag, compiler_args=f"--auto-cast=none --lnc={lnc} -O1") for tag in tags]

    @classmethod
    def get_config_cls(cls):
        return InferenceConfig

    @classmethod
    def get_neuron_config_cls(cls):
        return cls.get_config_cls().get_neuron_config_cls()

    def compile(self, compiled_model_path):
        how, _, what = os.environ.get("FAKE_NXDI", "").partition(" ")
        if how == "fail":
            raise RuntimeError("neuronx-cc failed with 70")
        settings = self.config.neuron_config
        if getattr(settings, "enable_fused_speculation", False):
            assert settings.on_device_sampling_config is not None
        folder, work = Path(compiled_model_path), Path(os.environ.get("BASE_COMPILE_WORK_DIR", "/tmp/nxd_model/"))
        self.config.save(folder)
        shutil.rmtree(work, ignore_errors=True)
        for model in self.models:
            (work / model.tag).mkdir(parents=True)
        torch.jit.script(Compiled()).save(folder / MODEL)
        (folder / "weights").mkdir()
        for rank in range(settings.tp_degree):
            weights = self._weights(rank)
            if how == "uneven" and rank:
                weights.popitem()
            save_file(weights, folder / f"weights/tp{rank}_sharded_checkpoint.safetensors")
        if how == "no":
            (folder / what).unlink()

    def load(self, compiled_model_path):
        """The file names are put together as the original does: a path without its last slash finds nothing."""
        path = os.path.join(os.path.normpath(compiled_model_path), "")
        self.traced_model = torch.jit.load(path + MODEL)
        ranks = range(self.config.neuron_config.local_ranks_size)
        self.weights = [load_file(f"{path}weights/tp{rank}_sharded_checkpoint.safetensors") for rank in ranks]

    def _weights(self, rank):
        fused = self.config.fused_spec_config
        roots = {"target_model": self.config._name_or_path, "draft_model": fused.draft_model_path}
        found = {"rank_util.rank": torch.tensor([rank], dtype=torch.int32)}
        for prefix, root in roots.items():
            for file in sorted(Path(root).glob("*.safetensors")):
                found |= {f"{prefix}.{name}": tensor for name, tensor in load_file(file).items()}
        return found
