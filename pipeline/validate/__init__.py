"""The gates that stand between a build and a release: parity, losslessness, distribution, acceptance.

`reference/` computes what is right, `gates/` compares, `report/` shows. All on the
shipped graphs. Entered by build and cli.
"""
