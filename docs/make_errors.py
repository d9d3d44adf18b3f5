"""The page of errors and exit codes, from pipeline/errors.py: errors.md."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from pipeline import errors
from pipeline.errors import CorruptError, GateError, HostError, InputError, RefusedError, TandemError

INTRO = """\
# Errors and exit codes

<!-- Written by docs/make_reference.py from the docstrings in pipeline/errors.py: change them there. -->

A command prints an error on stderr: its title, where the problem is, what it is, and what to do. An error with several
problems prints each of them. `-v` adds the traceback.

```console
$ tandem inspect missing
wrong input: ARTIFACT: no artifact 'missing': no folder `missing` or `artifacts/missing`
  fix: name an artifact's folder; in artifacts/: none
```

## Exit codes

| code | meaning | for a script |
|---|---|---|
| 0 | success | continue |
| {gate} | a validation gate failed | do not publish; look at the report |
| {input} | wrong input: a recipe, checkpoint, artifact, release or argument | correct the input; a retry fails again |
| {host} | environment: toolchain, device, network, disk, credentials | correct the machine, or try again later |
| {refused} | refused by a policy, a required signature or a yank | use another release; a retry fails again |
| {corrupt} | corrupt: bytes differ from their digest, or cannot be read | pull or publish again |
| 70 | a bug in Tandem; stderr has the traceback | report it |
| 130 | interrupted by Ctrl-C (SIGINT) | run the same command: it continues |

A command also ends with code 1 if the program that reads its output ends first, as `head` does in
`tandem ls ... | head -1`. `tandem doctor` ends with {host} if it lists a problem. vLLM's server with an artifact that
it cannot serve ends with the error's code.

With `--json`, a command prints its error on stdout too, as the only document; `kind` is `gate`, `input`, `environment`,
`refused`, `corrupt`, `bug` or `interrupted`. `tandem publish` prints its list, with an `error` for each registry that
failed.

```json
{{"error": {{"kind": "input", "exit_code": 2, "problems": [{{"where": "ARTIFACT", "what": "...", "fix": "..."}}]}}}}
```

Without a terminal, each line on stderr starts with its time in UTC (`TANDEM_TIMESTAMPS=0`: without).

## In Python

Every error that a user can fix is a `TandemError` from `tandem_spec`. Attributes:

| attribute | meaning |
|---|---|
| `where` | file, line and key, option, URL or machine part that has the problem; may be empty |
| `what` | the problem, with the value |
| `fix` | what to do; may be empty |
| `problems` | all problems, each with `where`, `what` and `fix`; at least one |
| `exit_code` | the code of the command line |
| `title` | the word that the command line prints first |

Any other exception is a bug: report it with the traceback.

## Classes

```text
{tree}
```
"""


def errors_page() -> str:
    """Return errors.md: exit codes, attributes, the tree, and a section for each class."""
    codes = {
        "gate": GateError.exit_code, "input": InputError.exit_code, "host": HostError.exit_code,
        "refused": RefusedError.exit_code, "corrupt": CorruptError.exit_code,
    }  # fmt: skip
    tree = "\n".join(_tree(TandemError, ""))
    lines = [INTRO.format(tree=tree, **codes)]
    lines += [f"### {kind.__name__}\n\n{_facts(kind)}\n\n{_text(kind)}\n" for kind in _classes(TandemError)]
    return "\n".join(lines).rstrip() + "\n"


def _text(kind: type[TandemError]) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _facts(kind: type[TandemError]) -> str:
    return f"Exit code {kind.exit_code}, printed as `{kind.title}:`."


def _below(kind: type[TandemError]) -> list[type[TandemError]]:
    """Return the direct subclasses that pipeline/errors.py defines, in its order."""
    return [below for below in vars(errors).values() if inspect.isclass(below) and below.__bases__ == (kind,)]


def _classes(kind: type[TandemError]) -> Iterator[type[TandemError]]:
    yield kind
    for below in _below(kind):
        yield from _classes(below)


def _tree(kind: type[TandemError], indent: str) -> Iterator[str]:
    yield f"{indent + kind.__name__:<24}{kind.exit_code}"
    for below in _below(kind):
        yield from _tree(below, indent + "    ")
