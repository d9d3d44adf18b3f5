"""Facts of this host, with the keys of a manifest's `requires`, found without torch: enough to choose a variant.

Loading an artifact checks again, with the backend itself. This module opens nothing for execution.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from pipeline.recipe.chips import CHIPS, chip_of_instance

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
NATIVE = {"bfloat16": ("avx512_bf16", "amx_bf16", "bf16"), "float16": ("avx512_fp16", "amx_fp16", "asimdhp")}
"""Instructions that multiply a dtype, by the kernel's names."""


def host_facts(proc: Path = Path("/proc"), dev: Path = Path("/dev"), sys: Path = Path("/sys")) -> dict[str, str]:
    """Return the device of this host and its properties. On a host with an accelerator, that is the accelerator."""
    if (dev / "neuron0").exists():
        chip = chip_of_instance(_read(sys / "devices/virtual/dmi/id/product_name"))
        default_lnc = next((entry.default_lnc for entry in CHIPS.values() if entry.name == chip), 1)
        lnc = os.environ.get("NEURON_LOGICAL_NC_CONFIG", str(default_lnc))
        return {"device": "neuron", "chip": chip, "lnc": lnc}
    if (dev / "nvidia0").exists() and (capability := _compute_capability()):
        return {"device": "cuda", "machine": platform.machine(), "compute_capability": capability}
    return {"device": "cpu", "machine": platform.machine(), "isa": _isa(proc)}


def processor_flags(proc: Path = Path("/proc")) -> frozenset[str]:
    """Return the flags of the processor, as the kernel names them; none where it lists none."""
    lines = [line for line in _read(proc / "cpuinfo").splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def multiplies(dtype: str, proc: Path = Path("/proc")) -> bool:
    """Return whether the processor multiplies `bfloat16` or `float16` with instructions of its own.

    Without them torch's products take 7 times as long as in float32, or more.
    """
    return not processor_flags(proc).isdisjoint(NATIVE[dtype])


def _isa(proc: Path) -> str:
    """Return the instruction set as torch names it: avx512 needs all four parts."""
    flags = processor_flags(proc)
    if flags.issuperset(AVX512):
        return "avx512"
    return "avx2" if "avx2" in flags and "fma" in flags else "default"


def _compute_capability() -> str:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, encoding="utf-8", errors="replace"
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return lines[0] if lines else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
