"""The plan of a build, made before it starts: graphs, memory, sizes, times, conflicts, and the lock.

`forecast` corrects the estimates by `history`, the builds that were recorded on this machine.

Reads no values of weights and uses no device. Imports no torch.
Entered by build, stages, measure, nxdi, proposal, doctor and cli.
"""
