"""The stages of a build, one file each: shard, compile, package; and the stamp that detects an unchanged build.

Validates and publishes nothing. `pipeline.build` defines their order.
Entered by build and nxdi.
"""
