from neuronx_distributed.trace.nxd_model.nxd_model import NxDModel

__all__ = ["NxDModel"]
