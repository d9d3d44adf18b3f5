"""Write docs/recipe.md from the recipe schema: `python docs/make_recipe_reference.py [--check]`. Invents nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.recipe.read import schema

OUT = Path(__file__).parent / "recipe.md"
INTRO = """\
# Recipe reference

<!-- Written by docs/make_recipe_reference.py from pipeline/recipe/schema.py: change the descriptions there. -->

A recipe is a YAML file in `recipes/`. `tandem recipe check NAME` reports all its problems at once, each with file, line
and key; `tandem recipe schema` prints the JSON Schema behind this page, for editors. How to write one:
[recipes/README.md](../recipes/README.md).

**required** marks keys without a default. K, batch and bucket lists are ascending.
"""


def reference() -> str:
    """The page."""
    root = schema()
    return "\n".join([INTRO, *_section("Top level", root, root), *_parts(root, root, "")]).rstrip() + "\n"


def _parts(node: dict[str, Any], root: dict[str, Any], prefix: str) -> Iterator[str]:
    """Sections under `node`, each below the one that holds it."""
    for key, value in node["properties"].items():
        found = _definitions(value, root)
        for definition in found:
            name = f"{prefix}{key}"
            choice = definition["properties"].get("name", {}).get("const")
            title = f"`{name}`" + (f" with `name: {choice}`" if choice else "")
            yield from _section(title, definition, root)
            yield from _parts(definition, root, f"{name}.")


def _section(title: str, node: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    yield f"## {title}\n\n{node.get('description', '')}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for key, value in node["properties"].items():
        default = "**required**" if key in node.get("required", ()) else _default(value)
        yield f"| `{key}` | {_kind(value, root)} | {default} | {value.get('description', '')} |"
    yield ""


def _definitions(value: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]]:
    """Sections that a value refers to."""
    places = [value, value.get("items", {}), *value.get("oneOf", ()), *value.get("anyOf", ())]
    names = [place["$ref"].rsplit("/", 1)[-1] for place in places if "$ref" in place]
    return [root["$defs"][name] for name in names]


def _kind(value: dict[str, Any], root: dict[str, Any]) -> str:
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    choices = [choice for choice in value.get("anyOf", ()) if choice.get("type") != "null"]
    if choices:
        return " or ".join(_kind(choice, root) for choice in choices)
    if value.get("type") == "array":
        return f"list of {_kind(value['items'], root)}"
    if _definitions(value, root):
        return "section"
    names = {"string": "text", "boolean": "true or false", "object": "mapping of text to text"}
    kind = names.get(value.get("type", ""), value.get("type", "section"))
    low, high = value.get("minimum"), value.get("maximum")
    return kind + (f", {low:g} to {high:g}" if high is not None else f" from {low:g}" if low is not None else "")


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if isinstance(default, dict):
        return "see below"
    return "" if default is None else f"`{json.dumps(default)}`"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if OUT.read_text() == reference() else f"{OUT} is stale: run python docs/make_recipe_reference.py")
    OUT.write_text(reference())
