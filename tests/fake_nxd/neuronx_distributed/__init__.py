"""Fake of neuronx_distributed: see README.md beside this package."""

from torch_neuronx.utils import get_platform_target

get_platform_target()  # the real package asks for the chip when it is imported, and fails without one

from neuronx_distributed.trace.model_builder_v2 import ModelBuilder
from neuronx_distributed.trace.nxd_model import NxDModel
from neuronx_distributed.trace.parallel_context import NxDParallelState

__all__ = ["ModelBuilder", "NxDModel", "NxDParallelState"]
