"""Isolate Inductor's folders and headers, and leave out code that no graph needs. Changes no result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.files.temporary import SAFE

INCLUDE = Path(__file__).with_name("include")
"""Headers that replace those of the standard library; each has the reason in a comment."""

PATH_OF_HEADERS = "CPLUS_INCLUDE_PATH"
"""Where gcc and clang look for headers after a command's own folders and before the system's."""

MARK = ".whole"
PRECOMPILED = ("*.gch", "*.pch")
"""Precompiled headers of GCC, and of Clang."""
NO_CHECKS = """
static bool _check_aoti_runtime_check_inputs_env() { return false; }
static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}
"""


@contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Let Inductor write its sources in `folder`: empty at first, removed at the end, and locked meanwhile.

    Inductor reuses existing sources and appends its commands to them each time, and both are stored in the package.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        # Inductor sets it once per process, to a folder in the scratch of the first graph.
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_headers(folder: Path) -> Iterator[None]:
    """Keep Inductor's precompiled headers in `folder`, without any that a killed compiler left half-written.

    All compiles that share the folder use the same headers, and Inductor uses any existing file. So a header is
    marked when a compile that used it has succeeded, and a header with neither a mark nor a held lock is removed.
    """
    from torch._inductor import codecache  # not at the top: the import takes seconds

    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(folder), str(folder / "locks")
    for header in _unmarked(folder):
        header.unlink(missing_ok=True)
    yield
    for header in _unmarked(folder):
        header.with_suffix(MARK).touch()


def move_headers(folder: Path) -> None:
    """Let Inductor precompile headers in `folder` if its own has a path that its command lines cannot hold."""
    from torch._inductor import codecache  # not at the top: the import takes seconds

    if SAFE.fullmatch(codecache._HEADER_DIR) is None:
        codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(folder), str(folder / "locks")


def _unmarked(folder: Path) -> list[Path]:
    """Return precompiled headers without a mark whose lock is free."""
    headers = []
    for header in [header for pattern in PRECOMPILED for header in folder.glob(pattern)]:
        if not header.with_suffix(MARK).exists():
            with suppress(Timeout), FileLock(folder / "locks" / f"{header.name.split('.')[0]}.lock", timeout=0):
                headers.append(header)
    return headers


@contextmanager
def own_headers() -> Iterator[None]:
    """Let the compiler find the headers in `INCLUDE` before the standard library's."""
    before = os.environ.get(PATH_OF_HEADERS)
    os.environ[PATH_OF_HEADERS] = os.pathsep.join([str(INCLUDE), *([before] if before else [])])
    try:
        yield
    finally:
        os.environ.pop(PATH_OF_HEADERS)
        if before is not None:
            os.environ[PATH_OF_HEADERS] = before


@contextmanager
def no_input_checks() -> Iterator[None]:
    """Leave out the optional checks of every input (an environment variable enables them): half of the code."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu  # not at the top: the import takes seconds

    def write_none(self: CppWrapperCpu) -> None:
        self.prefix.splice_aot(NO_CHECKS)

    original = CppWrapperCpu.generate_input_output_runtime_checks
    CppWrapperCpu.generate_input_output_runtime_checks = write_none
    try:
        yield
    finally:
        CppWrapperCpu.generate_input_output_runtime_checks = original
