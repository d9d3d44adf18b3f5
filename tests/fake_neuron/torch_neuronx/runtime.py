"""Fake device: runs the HLO inside a fake NEFF with XLA on the CPU, one rank."""

import gzip

import torch

HEADER = 1024


class Unusable:
    def __init__(self, *arguments):
        raise RuntimeError("not part of the fake SDK")


def parallel_load(ranks):
    """Weights onto the device of each rank: here, kept."""
    return [dict(weights) for weights in ranks]


class SPMDModel:
    """`initialize` and `forward` as NxDModel calls them."""

    def __init__(self, neff, metaneff, local_ranks, world_size):
        from torch_neuronx.proto import metaneff_pb2

        self.hlo = gzip.decompress(neff[HEADER:])
        self.meta = metaneff_pb2.MetaNeff()
        self.meta.ParseFromString(metaneff)
        self.ranks = local_ranks
        self.held = None

    def initialize(self, states, weights, start_rank):
        if self.ranks != 1:
            raise RuntimeError("the fake device has one core")
        names = [one.checkpoint_key.decode() for one in self.meta.input_tensors if one.checkpoint_key]
        missing = [name for name in names if name not in weights[0] and name not in states[0]]
        if missing:
            raise RuntimeError(f"weights not found: {missing}")
        self.weights, self.states = weights[0], states[0]

    def forward(self, inputs):
        from torch_neuronx.xla_impl.trace import run_hlo

        given, tensors = iter(inputs), []
        for one in self.meta.input_tensors:
            name = one.checkpoint_key.decode()
            tensor = next(given) if not name else self.states[name] if name in self.states else self.weights[name]
            if list(tensor.shape) != list(one.shape):
                raise RuntimeError(f"{name or 'input'} is {list(tensor.shape)}, the NEFF takes {list(one.shape)}")
            tensors.append(tensor)
        outputs = run_hlo(self.hlo, tensors)
        inputs_of = dict(self.meta.output_aliases_to)
        for place, source in inputs_of.items():
            self.states[self.meta.input_tensors[source].checkpoint_key.decode()].copy_(outputs[place])
        return [out for place, out in enumerate(outputs) if place not in inputs_of]


def _zeros(*shape, device=None, _make=torch.zeros, **options):
    """NxD makes state on `privateuseone:<rank>`, the SDK's name of a core: here it is ordinary memory."""
    return _make(*shape, device="cpu" if str(device).startswith("privateuseone") else device, **options)


torch.zeros = _zeros
