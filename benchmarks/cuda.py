"""Everything that is not known of graphs on a GPU, in one command of at most ten minutes.

    python benchmarks/cuda.py [--out artifacts/cuda.json]
    python benchmarks/cuda.py --random               # on a machine without a network
    python benchmarks/cuda.py --device cpu --tiny    # the same steps with the tiny pair, to test this file

Needs a GPU, torch with CUDA, the packages of `pip install '.[build]'`, a C++ compiler and the headers of the CUDA
toolkit, and installs nothing: what is missing is one error. Then each step (`cuda_steps.py`) runs in a process of its
own, with a limit of its own within the total. A step that fails, or runs out of time, does not end the run. The
results, with the end of the output of a failed step, are in one JSON file that is replaced after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS_FILE = Path(__file__).with_name("cuda_steps.py")
PACKAGES = ("torch", "numpy", "pydantic", "click", "ruamel", "filelock", "safetensors", "tokenizers", "transformers")
TOTAL_S = 600
END_S = 5
"""Left for killing a step and writing the last results."""

SHOWN_LINES = 40

Result = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One measurement: `limit_s` within the usual total, `needs` are steps without which it is left out."""

    name: str
    limit_s: int
    needs: tuple[str, ...] = ()


STEPS = (
    Step("machine", 60),
    Step("bandwidth", 30),
    Step("phases", 60),
    Step("build pico", 180),
    Step("gates pico", 90, ("build pico",)),
    Step("decode pico", 60, ("build pico",)),
    Step("build pair", 240),
    Step("decode pair", 60, ("build pair",)),
    Step("steps pair", 150, ("build pair",)),
    Step("gates pair", 180, ("build pair",)),
)
"""What tells most comes first: the sum of the limits is more than the total, which cuts the last ones."""


@dataclass(frozen=True)
class Run:
    """A folder for files, and the arguments of `cuda_steps.py` that all steps share."""

    work: Path
    arguments: tuple[str, ...]


def file_name(step: str, end: str) -> str:
    """Name of a step's file."""
    return f"{step.replace(' ', '-')}.{end}"


def run_step(run: Run, step: Step, limit_s: float) -> Result:
    """Run one step in a process of its own, and kill that with its children at the limit."""
    log, result = (run.work / file_name(step.name, end) for end in ("log", "json"))
    result.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "TANDEM_CACHE": str(run.work / "cache"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-u", str(STEPS_FILE), step.name, "--work", str(run.work), *run.arguments]
    started, since = time.monotonic(), time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            status = "ok" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: Result = {"status": status, "seconds": round(time.monotonic() - started, 1), "limit_s": round(limit_s)}
    if status == "ok":
        return found | {"result": json.loads(result.read_text(encoding="utf-8"))}
    return found | {"exit_code": process.returncode, "output": ends(run, log, since)}


def ends(run: Run, log: Path, since: float) -> dict[str, list[str]]:
    """The last lines of a step's output, and of the logs of graphs that were written since a time."""
    logs = [file for file in (run.work / "cache" / "logs").rglob("*.log") if file.stat().st_mtime >= since]
    return {
        file.name: file.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        for file in (log, *sorted(logs))
    }


def run_all(run: Run, out: Path, total_s: float) -> dict[str, Result]:
    """Run every step, and write all results after each. Stop after the first step if it finds a requirement missing."""
    deadline = time.monotonic() + total_s - END_S
    steps: dict[str, Result] = {}
    report = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "arguments": run.arguments,
              "limit_s": total_s, "steps": steps}  # fmt: skip
    for step in STEPS:
        left_s = deadline - time.monotonic()
        failed = [need for need in step.needs if steps[need]["status"] != "ok"]
        if failed or left_s <= 0:
            why = f"needs {', '.join(failed)}" if failed else "no time left"
            steps[step.name] = {"status": "left out", "seconds": 0.0, "why": why}
        else:
            steps[step.name] = run_step(run, step, min(step.limit_s * total_s / TOTAL_S, left_s))
        write(out, json.dumps(report, indent=1))
        print(row(step.name, steps[step.name]), flush=True)
        if step.name == "machine" and steps["machine"]["status"] != "left out":
            check(steps["machine"])
    return steps


def check(machine: Result) -> None:
    """List every missing requirement of this machine in one error."""
    if machine["status"] != "ok":
        raise SystemExit("\n".join(("the machine cannot be examined:", *machine["output"]["machine.log"])))
    if missing := machine["result"]["missing"]:
        raise SystemExit("\n".join(("this machine lacks:", *missing)))


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    from pipeline.files.atomic import write_atomic  # not at the top: `main` adds its folder to the path

    write_atomic(path, text.encode())


def row(name: str, found: Result) -> str:
    """One row of the table; of a failed step with the last line of its output."""
    shown = "; ".join(f"{key} {json.dumps(value)}" for key, value in found.get("result", {}).items())
    if "output" in found:
        shown = next((text for text in reversed(next(iter(found["output"].values()))) if text.strip()), "no output")
    return f"| {name} | {found['status']} | {found['seconds']:.0f} s | {shown or found.get('why', '')} |"


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny pair in the place of the default one")
    parser.add_argument("--random", action="store_true", help="random weights in the default target: no network")
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts/cuda.json", help="file of the results")
    parser.add_argument("--work", type=Path, help="folder for artifacts, cache and logs (default: beside --out)")
    parser.add_argument("--total", type=float, default=TOTAL_S, help="limit in seconds, of which steps have shares")
    args = parser.parse_args()
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise SystemExit(f"this machine lacks the packages {', '.join(missing)}; in {ROOT}: pip install '.[build]'")
    sys.path.insert(0, str(ROOT))
    flags = [f"--{name}" for name in ("tiny", "random") if getattr(args, name)]
    run = Run((args.work or args.out.with_suffix("")).absolute(), ("--device", args.device, *flags))
    run.work.mkdir(parents=True, exist_ok=True)
    print("| step | status | time | result |\n| --- | --- | --- | --- |", flush=True)
    steps = run_all(run, args.out.absolute(), args.total)
    print(f"\nall results: {args.out}")
    raise SystemExit(any(found["status"] != "ok" for found in steps.values()))


if __name__ == "__main__":
    main()
