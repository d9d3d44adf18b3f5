"""Compile HLO to a NEFF with neuronx-cc as a subprocess: log, time limit, and errors that explain its codes.

Written from the compiler's command line reference, "How to generate a NEFF file", its error codes, and "Work with NEFF
Files" in the Neuron SDK documents. Not called through libneuronxla, whose cache and flags depend on the environment.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cache.local import default_root
from pipeline.errors import ArtifactError, HostError, no_string
from pipeline.files.atomic import atomic_dir

TIMEOUT_S = 4 * 3600
"""A 70B graph takes about an hour; a compile of four hours hangs. `TANDEM_COMPILE_TIMEOUT_S` overrides it."""

INTERNAL_ERROR = 70
"""Exit status of the compiler's own failures. Without a documented code they are often transient (aws-neuron-sdk issue
1369), so only this status is retried."""

ATTEMPTS = 3
RETRY_DELAY_S = 5.0
CODE = re.compile(r"NCC_[A-Z]{4}\d{3}")
KEPT_LINES = 3
HLO, NEFF, LOG, COMMAND = "model.hlo", "model.neff", "log-neuron-cc.txt", "command.txt"

HEADER_BYTES = 1024
HEADER = struct.Struct("<5Q128sI32s16s256sI64sQI468s")

MORE_RANKS = "use more ranks (parallel.tensor), or smaller batch, prefill or kv buckets"
REPORT = "please report this bug of Tandem, with the log"
OPERATOR = "compare the log with `neuronx-cc list-operators --framework XLA`; " + REPORT
MEANINGS = {
    "NCC_EARG001": ("this chip does not have that logical core configuration", "set backend.lnc to an LNC of the chip"),
    "NCC_EBIR023": ("an MLP kernel is wider than its limit of 4096", MORE_RANKS),
    "NCC_EBVF030": ("the graph needs more instructions than a NEFF may have", MORE_RANKS),
    "NCC_EHCA005": ("a custom call that this compiler does not support", "use the compiler of the same SDK release"),
    "NCC_EMOD025": ("a tensor without a static shape", REPORT),
    "NCC_EOOM001": ("the graph's tensors do not fit the device's memory", MORE_RANKS),
    "NCC_EOOM002": ("the graph's tensors do not fit the device's memory", MORE_RANKS),
    "NCC_ESFH002": ("an integer constant that does not fit 32 bits", REPORT),
    "NCC_ESPP004": ("a data type that the chip does not have", "use dtype: bfloat16, float16 or float32"),
    "NCC_ESPP047": ("an 8-bit float that the chip does not have", "use dtype: bfloat16, float16 or float32"),
    "NCC_EUOC002": ("an operator that the compiler does not support", OPERATOR),
    "NCC_EVRF001": ("an operator that the compiler does not support", OPERATOR),
    "NCC_EVRF004": ("complex numbers, which the chip does not have", REPORT),
    "NCC_EVRF005": ("an 8-bit float that the chip does not have", "use dtype: bfloat16, float16 or float32"),
    "NCC_EVRF007": ("the graph needs more instructions than a NEFF may have", MORE_RANKS),
    "NCC_EVRF009": ("the graph's tensors do not fit the device's memory", MORE_RANKS),
    "NCC_EVRF013": ("top-k of integers", REPORT),
    "NCC_EVRF015": ("a custom call that this compiler does not support", "use the compiler of the same SDK release"),
    "NCC_EVRF016": ("a scatter that combines integers", REPORT),
    "NCC_EVRF019": ("a windowed reduction of several operands", REPORT),
    "NCC_EVRF031": ("a scatter past the end of its operand", REPORT),
    "NCC_EVRF035": ("a matrix product of integers", REPORT),
    "NCC_EVRF056": ("a gather past the end of its operand", REPORT),
    "NCC_EVRF060": ("a scatter that combines integers", REPORT),
    "NCC_EVRF061": ("an all-reduce of integers", REPORT),
    "NCC_EVRF062": ("a power of 64-bit integers", REPORT),
    "NCC_EVRF063": ("a reduce-scatter of integers", REPORT),
    "NCC_EVRF064": ("HLO that breaks XLA's shape rules", REPORT),
    "NCC_EVRF065": ("a kernel of another NKI version", "install packages of one SDK release"),
    "NCC_EXSP001": ("the graph's tensors do not fit the device's memory", MORE_RANKS),
    "NCC_EXTP004": ("the graph needs more instructions than a NEFF may have", MORE_RANKS),
}
"""Codes that a decoder can produce: meaning and fix."""

Kind = Literal["context", "step"]
KINDS: tuple[Kind, ...] = ("context", "step")
LONG_CONTEXT = 128 << 10

OWN_FLAGS = frozenset(["framework", "target", "lnc", "logical-nc-config", "output", "logfile", "verbose", "model-type"])
"""Flags that follow from other recipe keys or from the subprocess; a recipe cannot set them."""


@dataclass(frozen=True)
class NeffHeader:
    """Fields that a loader needs, of the 1024 bytes before a NEFF's archive."""

    header_bytes: int
    data_bytes: int
    version: tuple[int, int]
    lnc: int


def arguments(chip: str, lnc: int, extra: Mapping[str, str], kind: Kind, tokens: int = 1) -> list[str]:
    """Return flags that decide the code. `extra` has no dashes, as in recipes: `{"optlevel": "2"}`; "" is no value.

    They are those of NxD Inference's `ModelWrapper`. A *context* graph (prefill, score) is compiled as functions, to
    save compile time; a *step* is not, because it would pay for their calls, and its few collectives are not tiled.
    Context graphs of 128 k tokens or more have no vectorised DMA on two cores, where it spills.
    """
    is_context = kind == "context"
    tensorizer = ["--enable-ccop-compute-overlap", f"--cc-pipeline-tiling-factor={2 if is_context else 1}"]
    if not (is_context and lnc == 2 and tokens >= LONG_CONTEXT):
        tensorizer.append("--vectorize-strided-dma")
    hlo2tensorizer = [*(["--modular-flow-mac-threshold=10"] if is_context else []), "--verify-hlo=true"]
    flags = {
        "framework": "XLA",
        "target": chip,
        "model-type": "transformer",
        "lnc": str(lnc),
        "auto-cast": "none",
        "optlevel": "1" if is_context else "2",
        "tensorizer-options": " ".join(tensorizer),
        "internal-hlo2tensorizer-options": " ".join(hlo2tensorizer),
    }
    if chip in ("trn1", "inf2"):
        flags["enable-saturate-infinity"] = ""
    flags |= {name.lstrip("-"): value for name, value in extra.items()}
    return [f"--{name}={value}" if value else f"--{name}" for name, value in sorted(flags.items())]


def compile_neff(hlo: bytes, flags: Sequence[str], work: Path, environment: Mapping[str, str]) -> bytes:
    """Compile in the empty directory `work`; retry failures without a documented code.

    Raises:
        HostError: with the compiler's code, its meaning, the fix, and the folder of log and command.

    """
    no_string(flags, "flags", "compiler flags")
    for attempt in range(1, ATTEMPTS + 1):
        folder = work / f"attempt-{attempt}"
        folder.mkdir()
        status = _run(hlo, flags, folder, environment)
        if status == 0 and (folder / NEFF).is_file():
            data = (folder / NEFF).read_bytes()
            check_neff(data, str(folder / NEFF))
            return data
        if status != INTERNAL_ERROR or _codes(folder) or attempt == ATTEMPTS:
            break
        time.sleep(RETRY_DELAY_S * attempt)
    raise _failure(status, attempt, _keep(folder, hlo))


def read_header(data: bytes, where: str) -> NeffHeader:
    """Return the header of a NEFF.

    Raises:
        ArtifactError: the data is not a NEFF.

    """
    if len(data) < HEADER_BYTES:
        problem = f"truncated NEFF: {len(data)} bytes, the header alone has {HEADER_BYTES}"
        raise ArtifactError(problem, where=where, fix="build the artifact again")
    fields = HEADER.unpack_from(data)
    header = NeffHeader(fields[1], fields[2], (fields[3], fields[4]), fields[13])
    if header.header_bytes != HEADER_BYTES:
        problem = f"not a NEFF, or an unsupported format: header_size {header.header_bytes}, expected {HEADER_BYTES}"
        raise ArtifactError(problem, where=where, fix="build the artifact again")
    return header


def check_neff(data: bytes, where: str, lnc: int | None = None) -> NeffHeader:
    """Reject a NEFF that is truncated, or compiled for other logical cores than `lnc`.

    Raises:
        ArtifactError: names the field and both values.

    """
    header = read_header(data, where)
    if len(data) != header.header_bytes + header.data_bytes:
        expected = f"{header.header_bytes} + {header.data_bytes}"
        problem = f"truncated or damaged NEFF: {len(data)} bytes, the header describes {expected}"
        raise ArtifactError(problem, where=where, fix="pull or build the artifact again")
    if lnc is not None and header.lnc not in (0, lnc):  # 0: written by a compiler without this field
        problem = f"lnc_size mismatch: expected {lnc}, found {header.lnc}"
        raise ArtifactError(problem, where=where, fix="pull or build the artifact again")
    return header


def supported_operators(environment: Mapping[str, str]) -> str | None:
    """Return the compiler's own list of operators; None if it prints none."""
    command = ["neuronx-cc", "list-operators", "--framework", "XLA"]
    try:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env=dict(environment),
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout if len(process.stdout.split()) > 1 else None


def _run(hlo: bytes, flags: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run the compiler in `folder`, with its output in files there; return its exit status."""
    (folder / HLO).write_bytes(hlo)
    command = ["neuronx-cc", "compile", HLO, *flags, f"--output={NEFF}", f"--logfile={LOG}", "--verbose=35"]
    (folder / COMMAND).write_text(shlex.join(command) + "\n", encoding="utf-8", errors="surrogateescape")
    limit = float(os.environ.get("TANDEM_COMPILE_TIMEOUT_S", TIMEOUT_S))
    with (folder / "output.txt").open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError as error:
            fix = "activate the Neuron virtual environment; `tandem doctor --backend neuron` lists missing packages"
            raise HostError("neuronx-cc is not on PATH", where="compile", fix=fix) from error
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired as error:
            problem = f"neuronx-cc did not end within {limit:.0f} s"
            fix = f"log and command are in {_keep(folder, hlo)}; set TANDEM_COMPILE_TIMEOUT_S for more time"
            raise HostError(problem, where="compile", fix=fix) from error
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the compiler and its children if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _codes(folder: Path) -> list[str]:
    """Return the distinct error codes in a compiler's output, in order."""
    return list(dict.fromkeys(CODE.findall(_output(folder))))


def _output(folder: Path) -> str:
    paths = (folder / "output.txt", folder / LOG)
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())


def _keep(folder: Path, hlo: bytes) -> Path:
    """Copy graph, command, log and output of a failure to one folder per graph; the work directory is removed."""
    failure = default_root() / "failed-compiles" / hashlib.sha256(hlo).hexdigest()[:16]
    failure.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(failure) as copies:
        for name in (HLO, COMMAND, LOG, "output.txt"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copies / name)
    return failure


def _failure(status: int, attempts: int, folder: Path) -> HostError:
    codes = _codes(folder)
    tries = f" ({attempts} attempts)" if attempts > 1 else ""
    if codes:
        meaning, fix = MEANINGS.get(codes[0], ("see the compiler's error codes", "read the log"))
        problem = f"neuronx-cc: {codes[0]}: {meaning} (exit status {status}{tries})"
        return HostError(problem, where="compile", fix=f"{fix}; log and command are in {folder}")
    messages = [line for line in _output(folder).splitlines() if re.search(r"error|fail", line, re.IGNORECASE)]
    last = "; ".join(messages[-KEPT_LINES:]) or "no message"
    killed = status in (-signal.SIGKILL, 137)
    fix = "free memory or lower --workers" if killed else "read the log"
    return HostError(
        f"neuronx-cc ended with status {status}{tries}: {last}", where="compile", fix=f"{fix}; the log is in {folder}"
    )
