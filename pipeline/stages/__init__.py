"""The stages of a build, one file each: shard, compile, package, and the stamp that says nothing changed.

`pipeline.build` says in which order they run. Judges and publishes nothing. Entered by build and nxdi.
"""
