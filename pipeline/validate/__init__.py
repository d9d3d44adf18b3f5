"""Validation between a build and a release: `reference/` computes, `gates/` compares, `report/` shows.

Builds and publishes nothing. Every gate runs the shipped graphs.
Entered by stages, build, measure, distill and cli.
"""
