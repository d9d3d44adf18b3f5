"""Configuration: what goes in comes out of `neuron_config.json`, but for keys that it does not know."""

import importlib
import inspect
import json
import logging
import os
from pathlib import Path

import torch

CONFIG_FILE = "neuron_config.json"
DEFAULTS = {
    "batch_size": 1, "seq_len": 128, "tp_degree": 1, "ctx_batch_size": 1, "tkg_batch_size": 1, "max_batch_size": 1,
    "is_continuous_batching": False, "max_context_length": 128, "enable_bucketing": False,
    "context_encoding_buckets": None, "token_generation_buckets": None, "save_sharded_checkpoint": False,
    "speculation_length": 0, "enable_fused_speculation": False, "overrides_torch_dtype": True, "start_rank_id": 0,
}  # fmt: skip


def to_dict(value):
    if isinstance(value, dict):
        return {key: to_dict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [to_dict(inner) for inner in value]
    if inspect.isclass(value):
        return {"__module__": value.__module__, "__name__": value.__name__}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return to_dict(vars(value)) if hasattr(value, "__dict__") else value


class OnDeviceSamplingConfig:
    def __init__(self, **kwargs):
        known = {"do_sample": False, "top_k": 1, "dynamic": False, "deterministic": False, "global_topk": 256}
        vars(self).update({name: kwargs.get(name, default) for name, default in known.items()})


class NeuronConfig:
    def __init__(self, **kwargs):
        how, _, forgotten = os.environ.get("FAKE_NXDI", "").partition(" ")
        known = {name for name in DEFAULTS if (how, forgotten) != ("forget", name)}
        dtype = kwargs.pop("torch_dtype", "bfloat16")
        self.torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        sampling = kwargs.pop("on_device_sampling_config", None)
        self.on_device_sampling_config = OnDeviceSamplingConfig(**sampling) if isinstance(sampling, dict) else sampling
        self.logical_nc_config = kwargs.pop("logical_nc_config", 1)
        asked = os.environ.get("NEURON_LOGICAL_NC_CONFIG")
        if asked is not None and int(asked) != self.logical_nc_config:
            raise ValueError(f"NEURON_LOGICAL_NC_CONFIG={asked} does not match {self.logical_nc_config}")
        vars(self).update({name: kwargs.pop(name, default) for name, default in DEFAULTS.items() if name in known})
        self.local_ranks_size = kwargs.pop("local_ranks_size", self.tp_degree)
        assert (self.context_encoding_buckets or [0])[-1] <= self.max_context_length
        assert (self.token_generation_buckets or [0])[-1] <= self.seq_len
        if kwargs:
            logging.warning("NeuronConfig init: Unexpected keyword arguments: %s", kwargs)


class FusedSpecNeuronConfig:
    def __init__(self, worker_cls, draft_config=None, draft_model_path=None, draft_model_cls=None):
        self.worker_cls, self.draft_model_cls = worker_cls, draft_model_cls
        self.draft_config, self.draft_model_path = draft_config, draft_model_path


class InferenceConfig:
    def __init__(self, neuron_config, fused_spec_config=None, load_config=None, metadata=None, **kwargs):
        self.neuron_config, self.fused_spec_config, self.metadata = neuron_config, fused_spec_config, metadata
        if load_config is not None:
            load_config(self)
        vars(self).update(kwargs)
        missing = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if not hasattr(self, name)]
        assert not missing, f"Config must define {missing}"

    @classmethod
    def get_neuron_config_cls(cls):
        return NeuronConfig

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_dict(self), indent=2, sort_keys=True)
        Path(folder, CONFIG_FILE).write_text(text + "\n")

    @classmethod
    def load(cls, folder):
        found = json.loads(Path(folder, CONFIG_FILE).read_text())
        found["neuron_config"] = NeuronConfig(**found["neuron_config"])
        if fused := found["fused_spec_config"]:
            draft = fused["draft_config"]
            draft["neuron_config"] = NeuronConfig(**draft["neuron_config"])
            fused |= {name: _class(fused[name]) for name in ("worker_cls", "draft_model_cls")}
            fused["draft_config"] = fused["draft_model_cls"].get_config_cls()(**draft)
            found["fused_spec_config"] = FusedSpecNeuronConfig(**fused)
        return cls(**found)


def _class(named):
    return getattr(importlib.import_module(named["__module__"]), named["__name__"])
