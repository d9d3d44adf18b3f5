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

`tandem_spec` is the public interface, typed; everything else in `pipeline` may change in any version. The entry points
of earlier versions (`pipeline.runtime.load`, `pipeline.build.build`, `pipeline.registry.publish.publish`,
`pipeline.registry.pull.pull`, ...) are the same objects and keep working. Importing `tandem_spec` loads no PyTorch:
`load` and `build` do when they are called. The distribution is `tandem-spec`:
[install profiles](../index.md#install-profiles).

## Examples

Three programs are in `examples/`; the test lane runs them, and the code on this page.

Generate text with an artifact. A prompt is a text, a list of token ids, or a chat: a list of messages, which the chat
template is applied to. An `Engine` is not thread-safe, and holds memory and processes until the end of its block:

```python
from tandem_spec import load

with load("artifacts/smollm2-135m-spec") as engine:
    prompts = ["The quick brown fox", [{"role": "user", "content": "Name a colour."}]]
    for answer in engine.generate(prompts, max_new_tokens=32):
        print(answer.text, answer.finish_reason)
    print(engine.stats())
```

Ask for JSON of a schema, penalties, or log probabilities, of an artifact with `shaped` in `speculation.sampling`:

```python
from tandem_spec import Rules, load

schema = '{"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}'
with load("artifacts/smollm2-135m-spec") as engine:
    [answer] = engine.generate(["Name a colour as JSON:"], rules=Rules(json_schema=schema, logprobs=2))
    print(answer.text, [(each.token, each.logprob) for each in answer.logprobs])
```

Stream one answer as text. A piece never ends inside a character:

```python
from tandem_spec import load

with load("artifacts/smollm2-135m-spec") as engine:
    for piece in engine.stream("Once upon a time", max_new_tokens=32, temperature=0.7, seed=1):
        print(piece, end="", flush=True)
    print()
```

Build an artifact, publish it, and pull it on another machine:

```python
from pathlib import Path

from tandem_spec import build, publish, pull

artifact = build(Path("recipes/smollm2-135m-spec.yaml"))
release = publish(artifact.root, "artifacts/registry", ["latest"])
folder = pull(f"artifacts/registry/{release.name}@latest", Path("artifacts/pulled/latest"))
print(release.version, folder)
```

Handle an error. Every error that a user can fix is a `TandemError`, whose classes are also in `tandem_spec`:
[errors](errors.md). Anything else is a bug:

```python
from tandem_spec import TandemError, load

try:
    engine = load("artifacts/missing")
except TandemError as error:
    for problem in error.problems:
        print(problem.where, problem.what, problem.fix, sep="\\n")
```
"""


@dataclass(frozen=True)
class Entry:
    """A public name, the file of `pipeline/` that defines it, its own name there if it differs, its public methods."""

    name: str
    file: str
    own: str = ""
    methods: tuple[str, ...] = ()


SECTIONS = {
    "Recipes": (Entry("load_recipe", "recipe/read.py", "load"),),
    "Builds": (
        Entry("build", "build.py"),
        Entry("run_build", "build.py", "run"),
        Entry("BuildSettings", "stages/settings.py"),
        Entry("BuildReport", "build.py"),
    ),
    "Artifacts": (
        Entry("read_artifact", "artifact/manifest.py", "read"),
        Entry("Artifact", "artifact/manifest.py"),
        Entry("verify", "artifact/verify.py"),
        Entry("sign", "artifact/signing.py"),
        Entry("read_policy", "artifact/signing.py"),
        Entry("require_signature", "artifact/signing.py", "require"),
    ),
    "Generation": (
        Entry("load", "runtime/open.py"),
        Entry("Engine", "runtime/engine.py", methods=("generate", "stream", "stats", "close")),
        Entry("Generation", "runtime/calls.py"),
        Entry("Rules", "runtime/rules.py"),
        Entry("TokenLogProbs", "runtime/logprobs.py"),
    ),
    "Registries": (
        Entry("publish", "registry/publish.py"),
        Entry("PublishSettings", "registry/publish.py"),
        Entry("Release", "registry/publish.py"),
        Entry("pull", "registry/pull.py"),
        Entry("Selection", "registry/pull.py"),
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
    yield f"### tandem_spec.{entry.name}\n"
    if isinstance(node, ast.FunctionDef):
        yield from _documented(_signature(node, entry.name), node)
        return
    yield from _documented(_class(node), node)
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name in entry.methods:
            yield f"#### {entry.name}.{method.name}\n"
            yield from _documented(_signature(method, method.name), method)


def _definition(entry: Entry) -> ast.FunctionDef | ast.ClassDef:
    tree = ast.parse((ROOT / "pipeline" / entry.file).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    (node,) = [node for node in tree.body if isinstance(node, kinds) and node.name == (entry.own or entry.name)]
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


def _signature(node: ast.FunctionDef, name: str) -> str:
    """Return a function's signature, a parameter per line when it does not fit one line."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parameters = [text for text in _parameters(node.args) if text != "self"]
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in parameters) + f"){returns}"


def _parameters(args: ast.arguments) -> Iterator[str]:
    first = len(args.args) - len(args.defaults)
    for index, arg in enumerate(args.args):
        yield _parameter(arg, args.defaults[index - first] if index >= first else None)
    if args.kwonlyargs:
        yield "*"
    yield from (_parameter(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True))


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default is not None else "")


def _text(node: ast.AST) -> str:
    """Return code with the quotes that the formatter uses."""
    return ast.unparse(node).replace("''", '""')


def _class(node: ast.ClassDef) -> str:
    """Return a class with its public fields."""
    fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
    if not fields:
        return f"class {node.name}"
    return f"class {node.name}:\n" + "\n".join(f"    {_text(field)}" for field in fields)
