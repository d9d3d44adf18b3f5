"""Fake of libneuronxla: NxD imports its compile functions; Tandem runs neuronx-cc itself."""


def neuron_xla_compile(*arguments, **keywords):
    raise RuntimeError("Tandem compiles with neuronx-cc, not through libneuronxla")


neuron_xla_wlo_compile = neuron_xla_compile
