"""Facts of a pull in Prometheus' text format, for the textfile collector of node_exporter."""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.files.atomic import write_atomic
from pipeline.registry.pull import Pulled

BUILT = "%Y-%m-%dT%H:%M:%SZ"


def write_pulled(path: Path, reference: str, pulled: Pulled, seconds: float) -> None:
    """Write the metrics of a pull that succeeded.

    Raises:
        HostError: the file cannot be written.

    """
    of = {"reference": reference}
    release = of | {"name": pulled.name, "version": pulled.version, "digest": pulled.digest}
    lines = [
        *_gauge("tandem_pull_info", "Release of the last pull", 1, release),
        *_gauge("tandem_pull_bytes", "Size of the files of the last pull", pulled.size_bytes, of),
        *_gauge("tandem_pull_seconds", "Duration of the last pull", round(seconds, 3), of),
    ]
    if (built := _built(pulled.created)) is not None:
        age = "Time from the build of the release to its last pull, in seconds"
        lines += _gauge("tandem_release_age_seconds", age, round(time.time() - built), of)
        lines += _gauge("tandem_release_built_timestamp_seconds", "Build of the release", built, of)
    _write(path, [*lines, *_outcome(reference, 0)])


def write_failed(path: Path, reference: str, exit_code: int) -> None:
    """Write the metrics of a pull that failed: its exit code, and nothing of a release.

    Raises:
        HostError: the file cannot be written.

    """
    _write(path, _outcome(reference, exit_code))


def _outcome(reference: str, exit_code: int) -> list[str]:
    of = {"reference": reference}
    success, code = "Whether the last pull succeeded", "Exit code of the last pull (docs/reference/errors.md)"
    return [
        *_gauge("tandem_pull_success", success, int(exit_code == 0), of),
        *_gauge("tandem_pull_exit_code", code, exit_code, of),
        *_gauge("tandem_pull_timestamp_seconds", "End of the last pull", round(time.time()), of),
    ]


def _gauge(name: str, what: str, value: float, labels: Mapping[str, str]) -> list[str]:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return [f"# HELP {name} {what}.", f"# TYPE {name} gauge", f"{name}{{{shown}}} {value}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _built(created: str) -> int | None:
    """Return the time of a build in seconds since 1970; None for a manifest with another format of time."""
    try:
        return calendar.timegm(time.strptime(created, BUILT))
    except ValueError:
        return None


def _write(path: Path, lines: list[str]) -> None:
    write_atomic(path, ("\n".join(lines) + "\n").encode())
