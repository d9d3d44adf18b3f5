"""AWS Neuron: graphs traced by NxD's ModelBuilder or through StableHLO, compiled by neuronx-cc, one NEFF per graph.

    backend.py     the backend: trace, compile, open
    support.py     facts of a host: SDK versions, placeholder packages, chip, cores; imports no torch
    module.py      a graph as ModelBuilder takes it, and the seams of this backend
    hlo.py         a traced graph's canonical text, and the parts that neuronx-cc does not support
    costs.py       what a traced graph costs: memory, products, collectives
    compiler.py    neuronx-cc as a process of its own, its error codes, the header of a NEFF
    graph_file.py  the file of one graph
    boundary.py    what the parameters of a graph of the StableHLO frontend are
    export.py      a phase traced for that frontend; operators.py: those that torch-mlir cannot lower
    stablehlo.py   the lowering to HLO; hlo_messages.py: HLO as protobuf messages
    runtime.py     all graphs and all ranks as one NxDModel on the device

Written from the Neuron SDK's documents and the NxD source of release 2.29. `docs/explanation/neuron.md` lists what has
run on which host.

Independent of requests, text and gates. Imports no other backend.
Entered through `backends.base`; `nxdi` takes `support`.
"""
