"""AWS Neuron: graphs traced by NxD's ModelBuilder units, compiled by neuronx-cc, one NEFF a graph.

    support.py   what a host has: SDK versions, placeholder packages, chip, cores; no torch
    hlo.py       a traced graph's canonical text, and what in it neuronx-cc does not take
    compiler.py  neuronx-cc as a process of its own, its error codes, the header of a NEFF
    module.py    a graph as ModelBuilder wants it, and the seams of this backend
    graph_file.py  one graph's file
    backend.py   the backend: trace, compile, open
    runtime.py   all graphs and all ranks as one NxDModel on the device

Written from the Neuron SDK's documents and the NxD source of release 2.29; `docs/neuron.md` says what ran where.
"""
