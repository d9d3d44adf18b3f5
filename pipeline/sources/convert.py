"""Pickled weights -> safetensors, in a process without network and credentials that loads tensors only.

Reading a pickle can execute code. torch's loader for tensors refuses everything else; the process has no network, no
variables of the caller's environment and no home folder, in case the loader has a fault. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.errors import HostError, InputError, SourceError
from pipeline.files.atomic import atomic_dir
from pipeline.progress import Log
from pipeline.sources.checkpoint import CONFIG_FILES, PICKLED, TOKENIZER_FILES
from pipeline.sources.pointers import SINGLE

CHILD = """
import ctypes, os, sys
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(NEW_USER | NEW_NETWORK) and libc.unshare(NEW_NETWORK):
    sys.exit(f"no network namespace: {os.strerror(ctypes.get_errno())}")
import torch
from safetensors.torch import save_file
*files, out = sys.argv[1:]
tensors = {}
for file in files:
    found = torch.load(file, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    tensors |= {name: t.clone().contiguous() for name, t in found.items() if isinstance(t, torch.Tensor)}
save_file(tensors, out, {"format": "pt"})
"""
NO_NAMESPACE = "no network namespace"
TIMEOUT_S = 3600


def convert(source: Path, out: Path, log: Log) -> list[str]:
    """Write the folder `out` with the source's configs, tokenizer and, as safetensors, its pickled weights.

    Returns the names of the converted files.

    Raises:
        InputError: `out` exists. SourceError: no pickled weights, or a file that has more than tensors.
        HostError: this machine cannot start a process without network.

    """
    if out.exists():
        raise InputError("destination exists", where=str(out), fix="name a new folder")
    names = sorted(path.name for path in source.iterdir() if path.name.endswith(PICKLED) and path.is_file())
    weights = [name for name in names if name.startswith(("pytorch_model", "model"))] or names
    if not weights:
        raise SourceError(
            "no pickled weights", where=str(source), fix=f"name a folder with one of {', '.join(PICKLED)}"
        )
    log(f"reading {', '.join(weights)} in a process without network")
    with atomic_dir(out, replace=False) as work:
        for name in (*CONFIG_FILES, *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        _run([str((source / name).resolve()) for name in weights], work / SINGLE, source)
    return weights


def _run(files: list[str], out: Path, source: Path) -> None:
    """Run the process; its environment has nothing of the caller's but the search path."""
    environment = {"PATH": os.defpath, "HOME": str(out.parent), "TMPDIR": str(out.parent)}
    command = [sys.executable, "-I", "-c", CHILD, *files, str(out)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        what = f"not read within {TIMEOUT_S // 60} minutes"
        raise HostError(what, where=str(source), fix="convert it on a faster disk") from error
    if done.returncode == 0:
        return
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if NO_NAMESPACE in said:
        fix = "run the command where user namespaces are allowed, or as root in a container without network"
        raise HostError(said, where="tandem draft convert", fix=fix)
    fix = "use weights from a source that you trust and save them as safetensors there"
    raise SourceError(f"cannot be read as tensors alone: {said}", where=str(source), fix=fix)
