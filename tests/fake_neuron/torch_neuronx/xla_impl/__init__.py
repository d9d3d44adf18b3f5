from torch_neuronx.xla_impl import base, bucket_trace, ops, structure, torchscript, trace

__all__ = ["base", "bucket_trace", "ops", "structure", "torchscript", "trace"]
