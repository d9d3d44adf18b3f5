"""Fake device: runs the HLO inside a fake NEFF with XLA on the CPU."""

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
    """`initialize` and `forward` as NxDModel calls them. More than one rank runs where the HLO is XLA's."""

    def __init__(self, neff, metaneff, local_ranks, world_size):
        from torch_neuronx.proto import metaneff_pb2

        self.hlo = gzip.decompress(neff[HEADER:])
        self.meta = metaneff_pb2.MetaNeff()
        self.meta.ParseFromString(metaneff)
        if self.meta.serialized_graph_def:
            raise RuntimeError("a metaneff with the HLO in it names the build's folders")
        self.ranks = local_ranks
        self.run = None

    def initialize(self, states, weights, start_rank):
        names = [one.checkpoint_key.decode() for one in self.meta.input_tensors if one.checkpoint_key]
        missing = [name for name in names if name not in weights[0] and name not in states[0]]
        if missing:
            raise RuntimeError(f"weights not found: {missing}")
        self.weights, self.states = weights, states

    def forward(self, inputs):
        parameters = [self._parameters(inputs, self.states[rank], self.weights[rank]) for rank in range(self.ranks)]
        results = self._runner()(parameters)
        aliases = dict(self.meta.output_aliases_to)
        for rank, outputs in enumerate(results):
            for place, source in aliases.items():
                self.states[rank][self.meta.input_tensors[source].checkpoint_key.decode()].copy_(outputs[place])
        return [out for place, out in enumerate(results[0]) if place not in aliases]

    def _parameters(self, inputs, states, weights):
        given, tensors = iter(inputs), []
        for one in self.meta.input_tensors:
            name = one.checkpoint_key.decode()
            tensor = next(given) if not name else states[name] if name in states else weights[name]
            if list(tensor.shape) != list(one.shape):
                raise RuntimeError(f"{name or 'input'} is {list(tensor.shape)}, the NEFF takes {list(one.shape)}")
            tensors.append(tensor)
        return tensors

    def _runner(self):
        """The StableHLO frontend names tensors in a metaneff; its HLO runs on XLA's CPU client through jaxlib."""
        if self.run is None and self.meta.input_tensors[0].name:
            from support.xla_cpu import Executable

            self.run = Executable(self.hlo, self.ranks)
        elif self.run is None:
            from torch_neuronx.xla_impl.trace import run_hlo

            if self.ranks != 1:
                raise RuntimeError("the fake device has one core")
            self.run = lambda ranks: [run_hlo(self.hlo, ranks[0])]
        return self.run


def _zeros(*shape, device=None, _make=torch.zeros, **options):
    """NxD makes state on `privateuseone:<rank>`, the SDK's name of a core: here it is ordinary memory."""
    return _make(*shape, device="cpu" if str(device).startswith("privateuseone") else device, **options)


torch.zeros = _zeros
