"""The page of the Python entry points, from signatures and docstrings: python.md. Parses the code, imports none."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 100

INTRO = """\
# Python

<!-- Written by docs/make_reference.py from signatures and docstrings: change them in pipeline/. -->

The entry points below are the public interface; everything else in `pipeline` may change in any version. Importing
`pipeline.recipe`, `pipeline.build` and `pipeline.registry` loads no PyTorch; `pipeline.runtime` does.

## Examples

Generate text with an artifact. An `Engine` is not thread-safe, and holds memory and processes until `close`:

```python
from contextlib import closing

from pipeline.runtime import load

with closing(load("artifacts/smollm2-135m-spec")) as engine:
    prompts = [engine.text.chat(text) if engine.text.has_chat else text for text in ("Name a colour.", "Count to ten.")]
    answers = engine.generate(prompts, max_new_tokens=32)
    for answer in answers:
        print(answer.text, answer.finish_reason)
    print(engine.stats())
```

`generate` takes a list of prompts. A prompt is a text, or a list of token ids; the chat template is applied only with
`engine.text.chat`.

Build an artifact, publish it, and pull it on another machine:

```python
from pathlib import Path

from pipeline.build import build
from pipeline.registry.publish import publish
from pipeline.registry.pull import pull

artifact = build(Path("recipes/smollm2-135m-spec.yaml"), log=print)
release = publish(artifact.root, "artifacts/registry", ["latest"])
folder = pull(f"artifacts/registry/{release.name}@latest", Path("artifacts/pulled/latest"))
print(release.version, folder)
```

Handle an error. Every error that a user can fix is a `TandemError`; [errors](errors.md) has the classes:

```python
from pipeline.errors import TandemError
from pipeline.runtime import load

try:
    engine = load("artifacts/missing")
except TandemError as error:
    for problem in error.problems:
        print(problem.where, problem.what, problem.fix, sep="\\n")
```
"""


@dataclass(frozen=True)
class Entry:
    """A public name: the module to import it from, the file that defines it, and its public methods."""

    module: str
    name: str
    file: str
    methods: tuple[str, ...] = ()


SECTIONS = {
    "Recipes": (Entry("pipeline.recipe", "load", "recipe/read.py"),),
    "Builds": (
        Entry("pipeline.build", "build", "build.py"),
        Entry("pipeline.build", "run", "build.py"),
        Entry("pipeline.build", "BuildSettings", "stages/settings.py"),
        Entry("pipeline.build", "BuildReport", "build.py"),
    ),
    "Artifacts": (
        Entry("pipeline.artifact.manifest", "read", "artifact/manifest.py"),
        Entry("pipeline.artifact.manifest", "Artifact", "artifact/manifest.py"),
        Entry("pipeline.artifact.verify", "verify", "artifact/verify.py"),
        Entry("pipeline.artifact.signing", "read_policy", "artifact/signing.py"),
        Entry("pipeline.artifact.signing", "require", "artifact/signing.py"),
    ),
    "Generation": (
        Entry("pipeline.runtime", "load", "runtime/open.py"),
        Entry("pipeline.runtime", "Engine", "runtime/engine.py", ("generate", "stats", "close")),
        Entry("pipeline.runtime", "Generation", "runtime/engine.py"),
    ),
    "Registries": (
        Entry("pipeline.registry.publish", "publish", "registry/publish.py"),
        Entry("pipeline.registry.publish", "PublishSettings", "registry/publish.py"),
        Entry("pipeline.registry.publish", "Release", "registry/publish.py"),
        Entry("pipeline.registry.pull", "pull", "registry/pull.py"),
        Entry("pipeline.registry.pull", "Selection", "registry/pull.py"),
    ),
}


def python_page() -> str:
    """Return python.md: examples, then every public name by subject."""
    lines = [INTRO]
    for title, entries in SECTIONS.items():
        lines.append(f"## {title}\n")
        for entry in entries:
            lines += _section(entry)
    return "\n".join(lines).rstrip() + "\n"


def _section(entry: Entry) -> Iterator[str]:
    node = _definition(entry)
    yield f"### {entry.module}.{entry.name}\n"
    if isinstance(node, ast.FunctionDef):
        yield from _documented(_signature(node), node)
        return
    yield from _documented(_class(node), node)
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name in entry.methods:
            yield f"#### {entry.name}.{method.name}\n"
            yield from _documented(_signature(method), method)


def _definition(entry: Entry) -> ast.FunctionDef | ast.ClassDef:
    tree = ast.parse((ROOT / "pipeline" / entry.file).read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    (node,) = [node for node in tree.body if isinstance(node, kinds) and node.name == entry.name]
    missing = set(entry.methods) - {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
    assert not missing, f"{entry.name} has no {missing}"
    return node


def _documented(code: str, node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    text, _, raises = inspect.cleandoc(ast.get_docstring(node) or "").partition("\nRaises:\n")
    yield f"```python\n{code}\n```\n\n{text.strip()}\n"
    if raises:
        yield "| error | when |\n|---|---|"
        yield from (f"| `{name}` | {' '.join(reason.split())} |" for name, reason in _raised(raises))
        yield ""


def _raised(text: str) -> list[tuple[str, str]]:
    """Return the errors of a `Raises:` section with their reasons, which may run over several lines."""
    return re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.M | re.S)


def _signature(node: ast.FunctionDef) -> str:
    """Return a function's signature, a parameter per line when it does not fit one line."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parameters = [text for text in _parameters(node.args) if text != "self"]
    line = f"{node.name}({', '.join(parameters)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{node.name}(\n" + "".join(f"    {text},\n" for text in parameters) + f"){returns}"


def _parameters(args: ast.arguments) -> Iterator[str]:
    first = len(args.args) - len(args.defaults)
    for index, arg in enumerate(args.args):
        yield _parameter(arg, args.defaults[index - first] if index >= first else None)
    if args.kwonlyargs:
        yield "*"
    yield from (_parameter(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True))


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default is not None else "")


def _class(node: ast.ClassDef) -> str:
    """Return a class with its public fields."""
    fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
    if not fields:
        return f"class {node.name}"
    return f"class {node.name}:\n" + "\n".join(f"    {ast.unparse(field)}" for field in fields)
