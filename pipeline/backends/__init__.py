"""Toolchains that compile and run graphs; one file each."""
