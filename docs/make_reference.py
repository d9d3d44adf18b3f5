"""Write the pages of docs/reference/ from the code: `python docs/make_reference.py [--check]`. Imports no torch.

Correct a text where it is (a schema, a help text, a docstring), never on the page. Each module beside this one
makes one kind of page. With `--check`, nothing is written, and stale pages are an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # document this checkout, not one that is installed

from make_commands import commands_page
from make_drafts import drafts_page
from make_environment import environment_page
from make_errors import errors_page
from make_python import python_page
from make_schemas import manifest_page, recipe_page, report_page

FOLDER = Path(__file__).parent / "reference"
PAGES: dict[str, Callable[[], str]] = {
    "recipe.md": recipe_page,
    "commands.md": commands_page,
    "drafts.md": drafts_page,
    "environment.md": environment_page,
    "errors.md": errors_page,
    "manifest.md": manifest_page,
    "report.md": report_page,
    "python.md": python_page,
}


def stale() -> list[str]:
    """Return the names of pages that differ from what the code says."""
    return [name for name, page in PAGES.items() if _text(FOLDER / name) != page()]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        FOLDER.mkdir(exist_ok=True)
        for name, page in PAGES.items():
            (FOLDER / name).write_text(page(), encoding="utf-8")
    elif names := stale():
        sys.exit(f"stale pages in docs/reference/: {', '.join(names)}\n  fix: python docs/make_reference.py")
