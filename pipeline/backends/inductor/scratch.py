"""What Inductor leaves on disk and in C++ while it compiles: kept apart, whole, and small. Changes no result."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SCRATCH = Path(tempfile.gettempdir()) / f"tandem-inductor-{os.getuid()}"
"""Where Inductor writes: one folder a graph, always the same one, because its path ends up in the library."""

MARK = ".whole"
HEADERS: dict[str, Any] = {}
"""What Inductor remembers of headers in this process, by the wrapper's level of optimisation."""
NO_CHECKS = """
static bool _check_aoti_runtime_check_inputs_env() { return false; }
static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}
"""


@contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Let Inductor write its sources in `folder`, which is empty at first and gone at the end; others wait.

    Inductor takes sources that it finds and adds its commands to them each time, and both end up in the package.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_headers(folder: Path, level: str) -> Iterator[None]:
    """Keep Inductor's precompiled headers in `folder`, without any that a killed compiler left half-written.

    All compiles that share the folder use the same headers. Inductor takes whatever file is there, for ever. So one is
    marked once a compile that saw it has succeeded, and one without a mark that nobody is writing is removed. Inductor
    also remembers, for a process, which header a command takes, but not the wrapper's optimisation `level`, which the
    header depends on: compilers ignore one of another level, and its name would end up in the package.
    """
    from torch._inductor import codecache

    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(folder), str(folder / "locks")
    codecache._precompile_header = HEADERS.setdefault(level, cache(codecache._precompile_header.__wrapped__))
    for header in _unmarked(folder):
        header.unlink(missing_ok=True)
    yield
    for header in _unmarked(folder):
        header.with_suffix(MARK).touch()


def _unmarked(folder: Path) -> list[Path]:
    """Precompiled headers without a mark whose lock is free."""
    found = []
    for header in folder.glob("*.gch"):
        if not header.with_suffix(MARK).exists():
            with suppress(Timeout), FileLock(folder / "locks" / f"{header.name.split('.')[0]}.lock", timeout=0):
                found.append(header)
    return found


@contextmanager
def no_input_checks() -> Iterator[None]:
    """Leave out the checks of every input that an environment variable turns on: half the code to compile."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def write_none(self: CppWrapperCpu) -> None:
        self.prefix.splice_aot(NO_CHECKS)

    original = CppWrapperCpu.generate_input_output_runtime_checks
    CppWrapperCpu.generate_input_output_runtime_checks = write_none
    try:
        yield
    finally:
        CppWrapperCpu.generate_input_output_runtime_checks = original
