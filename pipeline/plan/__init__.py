"""The plan of a build, made before it starts: graphs, memory, sizes, times, conflicts, and the lock.

Reads no values of weights and uses no device. Imports no torch.
Entered by build, stages, nxdi, doctor and cli.
"""
