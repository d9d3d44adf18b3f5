"""Isolate Inductor's folders and headers, and leave out code that no graph needs. Changes no result."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pipeline.files.temporary import SAFE

if TYPE_CHECKING:
    from torch._inductor.cpp_builder import CppBuilder

INCLUDE = Path(__file__).with_name("include")
"""Headers that replace those of the standard library; each has the reason in a comment."""

PATH_OF_HEADERS = "CPLUS_INCLUDE_PATH"
"""Where gcc and clang look for headers after a command's own folders and before the system's."""

MARK = ".whole"
"""Ending of the mark of a whole header, and of the lock that is held while it is compiled and marked."""
UNUSED_DAYS = 7
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

    All compiles that share the folder use the same headers, and Inductor uses any existing file. So a header is marked
    as soon as its compiler has succeeded; one with neither a mark nor a held lock is removed, and so are those that no
    compile used for `UNUSED_DAYS`, of this folder and of those beside it: a header takes 130 MB.
    """
    from torch._inductor import codecache  # not at the top: the import takes seconds

    compile_cpp = codecache._worker_compile_cpp

    def compile_marked(lock: str, builders: Sequence[CppBuilder]) -> None:
        with FileLock(f"{lock}{MARK}"):
            compile_cpp(lock, builders)
            for target in (Path(builder.get_target_file_path()) for builder in builders):
                if target.parent == folder:
                    target.with_suffix(MARK).touch()

    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(folder), str(folder / "locks")
    _remove_unmarked(folder)
    for header in _unused(folder.parent):
        header.unlink(missing_ok=True)
        header.with_suffix(MARK).unlink(missing_ok=True)
    codecache._worker_compile_cpp = compile_marked
    try:
        yield
    finally:
        codecache._worker_compile_cpp = compile_cpp


def move_headers(folder: Path) -> None:
    """Let Inductor precompile headers in `folder` if its own has a path that its command lines cannot hold."""
    from torch._inductor import codecache  # not at the top: the import takes seconds

    if SAFE.fullmatch(codecache._HEADER_DIR) is None:
        codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(folder), str(folder / "locks")


def _remove_unmarked(folder: Path) -> None:
    """Remove precompiled headers without a mark, except those that another process compiles."""
    for header in _headers(folder, ""):
        lock = folder / "locks" / f"{header.name.split('.')[0]}.lock{MARK}"
        with suppress(Timeout), FileLock(lock, timeout=0):
            if not header.with_suffix(MARK).exists():
                header.unlink(missing_ok=True)


def _unused(folders: Path) -> list[Path]:
    """Return precompiled headers whose mark is old."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    return [header for header in _headers(folders, "*/") if _changed(header.with_suffix(MARK)) < oldest]


def _headers(folder: Path, prefix: str) -> list[Path]:
    return [header for pattern in PRECOMPILED for header in folder.glob(f"{prefix}{pattern}")]


def _changed(path: Path) -> float:
    """Return when a file was last written; the end of time for one that is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


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
