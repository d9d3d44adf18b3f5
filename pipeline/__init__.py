"""Tandem: compile a target LLM and its draft ahead of time into one validated, versioned artifact."""

__version__ = "0.1.0"
