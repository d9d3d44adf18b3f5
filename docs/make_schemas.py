"""The pages of the file formats, from their pydantic models: recipe.md, manifest.md, report.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.artifact.manifest import MANIFESTS, CacheManifest, Manifest, NxdiManifest, PairManifest
from pipeline.recipe.read import schema as recipe_schema
from pipeline.validate.report.schema import schema as report_schema

Node = dict[str, Any]

RECIPE = """\
# Recipe keys

<!-- Written by docs/make_reference.py from pipeline/recipe/schema.py: change the descriptions there. -->

A recipe is a YAML file in `recipes/`. `tandem recipe check NAME` reports all its problems at once, each with file, line
and key; `tandem recipe schema` prints the JSON Schema behind this page, for editors. How to write a recipe:
`recipes/README.md`.

**required** marks keys without a default. K, batch and bucket lists are ascending.
"""

MANIFEST = """\
# Manifest

<!-- Written by docs/make_reference.py from pipeline/artifact/manifest.py: change the descriptions there. -->

`manifest.json` describes an artifact and pins each of its files by size and SHA-256. Tandem opens only files that the
manifest lists. A signature covers the bytes of the manifest. `tandem inspect ARTIFACT --json` prints the manifest with
values derived from it.

`schema_version` is {version}; a manifest of another version is rejected. Unknown fields are rejected. `kind` says which
of the sections below describes the other fields.
"""

REPORT = """\
# Parity report

<!-- Written by docs/make_reference.py from pipeline/validate/report/schema.py: change the descriptions there. -->

`reports/parity.json` in an artifact holds the results of the validation gates. `tandem report --schema` prints the JSON
Schema behind this page. The HTML page, the terminal output, the Markdown summary and the JUnit file show the numbers of
this file.

The *baseline* is transformers one precision above the recipe's dtype. *Error* is the difference between the artifact
and the baseline, *noise* the difference between transformers in the recipe's dtype and the baseline. A *flip* is a
token for which the artifact's choice differs from the baseline's; at a *near-tie*, the logits of both tokens are so
close that noise can swap them. A number is null where it is infinite or not a number. What the gates test:
[validation](../explanation/validation.md).
"""

KINDS: dict[str, tuple[type[Manifest], str]] = {
    "pair": (PairManifest, "built by `tandem build`"),
    "nxdi": (NxdiManifest, "compiled by NxD Inference: `tandem nxdi --compile`"),
    "vllm-compile-cache": (CacheManifest, "a compile cache of vLLM's Neuron plugin: `tandem vllm-cache pack`"),
}
NAMES = {"string": "text", "boolean": "true or false", "null": "null"}


def recipe_page() -> str:
    """Return recipe.md: a section for each part of a recipe, below the part that holds it."""
    root = recipe_schema()
    return _page([RECIPE, *_recipe_section("Top level", root, root), *_recipe_parts(root, root, "")])


def manifest_page() -> str:
    """Return manifest.md: the fields of every kind, those of each kind, and the objects in them."""
    root = MANIFESTS.json_schema(mode="serialization")
    common = Manifest.model_json_schema(mode="serialization")
    lines = [MANIFEST.format(version=common["properties"]["schema_version"]["const"])]
    lines += _fields("Every kind", common, common["properties"])
    for kind, (model, origin) in KINDS.items():
        node = root["$defs"][model.__name__]
        own = {name: value for name, value in node["properties"].items() if name not in common["properties"]}
        lines += _fields(f"Kind `{kind}`", node | {"description": f"{node['description']}\n\nOrigin: {origin}."}, own)
    kinds = {model.__name__ for model, _ in KINDS.values()}
    return _page([*lines, *_definitions(root, kinds)])


def report_page() -> str:
    """Return report.md: the top level of a report, then the objects in it."""
    root = report_schema()
    return _page([REPORT, *_fields("Top level", root, root["properties"]), *_definitions(root, set())])


def _page(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def _fields(title: str, node: Node, properties: dict[str, Node]) -> Iterator[str]:
    """Yield a section: the description, and a table of the fields, without a column that would be empty."""
    yield f"## {title}\n\n{node.get('description', '')}\n"
    if not any("description" in value for value in properties.values()):
        yield "| field | type |\n|---|---|"
        yield from (f"| `{name}` | {_type(value)} |" for name, value in properties.items())
    else:
        yield "| field | type | meaning |\n|---|---|---|"
        for name, value in properties.items():
            yield f"| `{name}` | {_type(value)} | {value.get('description', '')} |"
    yield ""


def _definitions(root: Node, without: set[str]) -> Iterator[str]:
    for name, node in sorted(root["$defs"].items()):
        if name not in without and "properties" in node:
            yield from _fields(name, node, node["properties"])


def _type(value: Node) -> str:
    """Return the type of a field of a manifest or report, with links to the sections of objects."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in value or "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if choices := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(_type(choice) for choice in choices)
    if "prefixItems" in value:
        return f"list of {len(value['prefixItems'])}: {', '.join(_type(item) for item in value['prefixItems'])}"
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"mapping of text to {_type(inner)}" if isinstance(inner, dict) else "object"
    return NAMES.get(value.get("type", ""), value.get("type", "any"))


def _recipe_parts(node: Node, root: Node, prefix: str) -> Iterator[str]:
    """Yield the sections under `node`, each below the one that holds it."""
    for key, value in node["properties"].items():
        for definition in _sections(value, root):
            name = f"{prefix}{key}"
            choice = definition["properties"].get("name", {}).get("const")
            title = f"`{name}`" + (f" with `name: {choice}`" if choice else "")
            yield from _recipe_section(title, definition, root)
            yield from _recipe_parts(definition, root, f"{name}.")


def _recipe_section(title: str, node: Node, root: Node) -> Iterator[str]:
    yield f"## {title}\n\n{node.get('description', '')}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for key, value in node["properties"].items():
        default = "**required**" if key in node.get("required", ()) else _default(value)
        yield f"| `{key}` | {_kind(value, root)} | {default} | {value.get('description', '')} |"
    yield ""


def _sections(value: Node, root: Node) -> list[Node]:
    """Return the sections that a value of a recipe refers to."""
    places = [value, value.get("items", {}), *value.get("oneOf", ()), *value.get("anyOf", ())]
    names = [place["$ref"].rsplit("/", 1)[-1] for place in places if "$ref" in place]
    return [root["$defs"][name] for name in names]


def _kind(value: Node, root: Node) -> str:
    """Return the type of a value of a recipe, with its range."""
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    choices = [choice for choice in value.get("anyOf", ()) if choice.get("type") != "null"]
    if choices:
        return " or ".join(_kind(choice, root) for choice in choices)
    if value.get("type") == "array":
        return f"list of {_kind(value['items'], root)}"
    if _sections(value, root):
        return "section"
    names = NAMES | {"object": "mapping of text to text"}
    kind = names.get(value.get("type", ""), value.get("type", "section"))
    low, high = value.get("minimum"), value.get("maximum")
    return kind + (f", {low:g} to {high:g}" if high is not None else f" from {low:g}" if low is not None else "")


def _default(value: Node) -> str:
    default = value.get("default")
    if isinstance(default, dict):
        return "see below"
    return "" if default is None else f"`{json.dumps(default)}`"
