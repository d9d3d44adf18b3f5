"""The stages of a build, one file each: shard, compile, package; the stamp that detects an unchanged build; the clock.

Validates and publishes nothing. `pipeline.build` defines their order.
Entered by build, nxdi, serve, measure, doctor and cli.
"""
