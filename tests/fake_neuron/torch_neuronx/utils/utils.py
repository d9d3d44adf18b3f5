import os
import re

SUPPORTED_TYPES = ["inf2", "trn1", "trn1n", "trn2", "trn3"]


def get_platform_target(arguments=None):
    """The chip named by compiler arguments, else by the environment; a host without devices has no other."""
    text = " ".join(arguments) if isinstance(arguments, list | tuple) else arguments or ""
    named = re.search(r"--target[= ](\S+)", text)
    target = named.group(1) if named else os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if target not in SUPPORTED_TYPES:
        raise RuntimeError(f"Unsupported Platform - {target}")
    return target
