"""Releases: publish, pull, copy, list, aliases, collection. One layout over every kind of store.

Opens and runs no graph. Imports no torch.
Entered by stages, nxdi and cli.
"""
