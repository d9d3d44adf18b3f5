"""Fake of torch_neuronx: see README.md beside this package."""

import types

import neuronxcc  # noqa: F401 - installs the finder of unusable kernel modules
import torch

__version__ = "2.9.0.2.13.fake"


class BucketModelConfig:
    """Only its name is imported."""


class contexts:
    class disable_nrt_load:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False


def move_trace_to_device(model, index):
    raise RuntimeError("no Neuron device")


from torch_neuronx import runtime

torch.classes.neuron = types.SimpleNamespace(
    SPMDModel=runtime.SPMDModel, LayoutTransformation=runtime.Unusable, Model=runtime.Unusable
)
torch.ops.neuron = types.SimpleNamespace(_parallel_load=runtime.parallel_load)
