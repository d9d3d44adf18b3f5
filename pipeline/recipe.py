"""YAML -> Recipe: the schema, and every check that needs no weights and no device. Imports no torch.

Errors name file, line and key, and all problems of a file are reported together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import InputError, Problem, RecipeError

Dtype = Literal["float32", "bfloat16", "float16"]
Sampling = Literal["greedy", "stochastic"]


def _buckets(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values:
        raise ValueError("empty; give at least one")
    if min(values) < 1:
        raise ValueError(f"{min(values)} is not positive")
    if list(values) != sorted(set(values)):
        raise ValueError(f"{list(values)} is not ascending without repeats; write {sorted(set(values))}")
    return values


Buckets = Annotated[tuple[int, ...], AfterValidator(_buckets)]


class Part(BaseModel):
    """Base of every section: immutable, unknown keys refused, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Derive(Part):
    """A draft made of some of the target's layers."""

    from_: Literal["target"] = Field(alias="from")
    layers: Annotated[tuple[int, ...], Field(min_length=1, description="layers of the target, in order")]


class Target(Part):
    """The model whose output is served."""

    source: str = Field(description="a folder, hf://org/name@revision, package://name==version, or pico://family")
    dtype: Dtype = Field("float32", description="dtype of weights and caches")


class Draft(Part):
    """The model that proposes: exactly one of `source` and `derive`."""

    source: str | None = Field(None, description="like target.source; may have a reduced vocabulary (draft_vocab_size, d2t)")
    derive: Derive | None = None
    dtype: Dtype | None = Field(None, description="the target's when left out")
    placement: Literal["replicated", "sharded"] = Field("replicated", description="whole on every rank, or split")

    @model_validator(mode="after")
    def _one_origin(self) -> Draft:
        if (self.source is None) == (self.derive is None):
            raise ValueError("give exactly one of source and derive")
        return self


class Speculation(Part):
    """How tokens are proposed and chosen."""

    method: Literal["draft_model"] = "draft_model"
    draft_tokens: Buckets = Field(description="K: proposals per step, vLLM's num_speculative_tokens; a graph for each")
    sampling: Annotated[tuple[Sampling, ...], Field(min_length=1)] = ("greedy",)
    candidates: Annotated[int, Field(ge=1)] | None = Field(
        None, description="tokens a stochastic graph keeps before sampling; all when left out"
    )


class Shapes(Part):
    """Buckets: the static shapes graphs are compiled for."""

    batch: Buckets = Field(description="rows decoded together")
    prefill: Buckets = Field(description="prompt lengths in tokens")
    kv: Buckets = Field(description="cache lengths in tokens; the largest bounds prompt + output")


class Parallel(Part):
    """Ranks."""

    tensor: Annotated[int, Field(ge=1)] = Field(1, description="tensor-parallel ranks")


class InductorBackend(Part):
    """AOTInductor."""

    name: Literal["inductor"] = "inductor"
    device: Literal["cpu", "cuda"] = "cpu"
    isa: Literal["native", "avx2", "avx512"] = Field("native", description="instruction set of a CPU artifact")


class NeuronBackend(Part):
    """AWS Neuron: NEFFs for Trainium and Inferentia."""

    name: Literal["neuron"]
    target: Literal["trn1", "trn2", "inf2"]
    lnc: int = Field(1, description="physical cores in a logical one: 1 or 2 on trn2, 1 elsewhere")
    flags: dict[str, str] = Field(default_factory=dict, description="extra neuronx-cc flags")

    @model_validator(mode="after")
    def _lnc_fits(self) -> NeuronBackend:
        allowed = (1, 2) if self.target == "trn2" else (1,)
        if self.lnc not in allowed:
            raise ValueError(f"lnc={self.lnc}: {self.target} has lnc {' or '.join(map(str, allowed))}")
        return self


Backend = Annotated[InductorBackend | NeuronBackend, Field(discriminator="name")]


class Gates(Part):
    """Limits of the validation gates."""

    tokens_per_step: Annotated[float, Field(ge=1)] = Field(1.0, description="least tokens a speculative step emits, on average")
    near_tie_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.02, description="most of tokens that may flip at near-ties")


class Validate(Part):
    """What is tested before an artifact may be published."""

    prompts: str = Field("prompts/default.jsonl", description="JSON lines with id, class, prompt")
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    gates: Gates = Gates()


class Publish(Part):
    """A registry that a build's artifact goes to."""

    to: str
    aliases: tuple[str, ...] = ()


class Recipe(Part):
    """One target and draft pair and all that decides its artifact."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    target: Target
    draft: Draft
    speculation: Speculation
    shapes: Shapes
    parallel: Parallel = Parallel()
    backend: Backend = InductorBackend()
    validate_: Validate = Field(default=Validate(), alias="validate")
    publish: tuple[Publish, ...] = ()


def load(path: Path) -> Recipe:
    """Read a recipe; `base: other.yaml` in it is merged beneath, one level deep.

    Raises:
        RecipeError: every problem, each with file, line and key.
        InputError: no such file.
    """
    data, lines = _read(path)
    if isinstance(data, dict) and "base" in data:
        below, below_lines = _read(path.parent / str(data.pop("base")))
        data, lines = _merge(below, data), below_lines | lines
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError([_problem(dict(e), path, lines, data) for e in error.errors()]) from error
    problems = [Problem(_place(path, lines, key), what, fix) for key, what, fix in cross_checks(recipe)]
    if problems:
        raise RecipeError(problems)
    return recipe


def find(name: str, root: Path = Path("recipes")) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        InputError: there is none; names what there is.
    """
    for path in (root / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = sorted(path.stem for path in root.glob("*.yaml"))
    near = difflib.get_close_matches(name, known, 1)
    fix = f"did you mean {near[0]!r}?" if near else f"recipes here: {', '.join(known) or 'none'}"
    raise InputError(f"no recipe {name!r}", where=str(root), fix=fix)


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def cross_checks(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Conflicts between sections: (key, what, fix)."""
    shapes, longest = recipe.shapes, recipe.shapes.kv[-1]
    if shapes.prefill[-1] >= longest:
        yield "shapes.prefill", f"bucket {shapes.prefill[-1]} leaves no room in the largest kv bucket {longest}", (
            f"use prefill buckets below {longest}"
        )
    for k in recipe.speculation.draft_tokens:
        if k + 1 >= shapes.kv[0]:
            yield "speculation.draft_tokens", f"K={k} does not fit the kv bucket {shapes.kv[0]}", (
                f"use K below {shapes.kv[0] - 1}"
            )


class _Unique(yaml.SafeLoader):
    """YAML without duplicate keys."""


def _read(path: Path) -> tuple[Any, dict[str, int]]:
    """Data of a file, and the line of every key path in it."""
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=_Unique)
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), fix="save the recipe as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError([Problem(place, f"not YAML: {getattr(error, 'problem', error)}", "repair the syntax")]) from error
    if node is None or not isinstance(node, yaml.MappingNode):
        raise RecipeError([Problem(f"{path}:1", "not a mapping", "start with `name:`")])
    lines: dict[str, int] = {}
    twice = list(_index(node, "", lines))
    if twice:
        raise RecipeError([Problem(f"{path}:{line}: {key}", "key given twice", "keep one") for key, line in twice])
    return yaml.load(text, Loader=_Unique), lines  # noqa: S506 - a SafeLoader


def _index(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Record the line of each key path below `node`; yields keys that are given twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}.{key.value}".lstrip(".")
            if path in lines:
                yield path, key.start_mark.line + 1
            lines[path] = key.start_mark.line + 1
            yield from _index(value, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{prefix}.{index}"] = value.start_mark.line + 1
            yield from _index(value, f"{prefix}.{index}", lines)


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}


def _place(path: Path, lines: dict[str, int], key: str) -> str:
    """`file:line: key`, with the line of the nearest key that is there."""
    parts = key.split(".")
    for size in range(len(parts), 0, -1):
        line = lines.get(".".join(parts[:size]))
        if line:
            return f"{path}:{line}: {key}"
    return f"{path}:1: {key}"


def _problem(error: dict[str, Any], path: Path, lines: dict[str, int], data: Any) -> Problem:
    """A pydantic finding in our words."""
    raw = [str(part) for part in error["loc"] if part not in ("inductor", "neuron")]
    key = ".".join(raw)
    where = _place(path, lines, key)
    if error["type"] == "extra_forbidden":
        known = _keys_at(raw[:-1], data)
        near = difflib.get_close_matches(raw[-1], known, 1)
        return Problem(where, "unknown key", f"did you mean {near[0]!r}?" if near else f"keys here: {', '.join(known)}")
    if error["type"] == "missing":
        return Problem(where, "missing", f"add `{raw[-1]}:`")
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict | list | tuple) else f"{error['input']!r}: "
    expected = str(error.get("ctx", {}).get("expected", ""))
    near = difflib.get_close_matches(str(error["input"]), expected.replace("'", "").replace(" or ", ", ").split(", "), 1)
    return Problem(where, f"{shown}{message}", f"did you mean {near[0]!r}?" if near else "see docs/recipe.md")


def _keys_at(path: list[str], data: Any) -> list[str]:
    """Keys that the section at `path` may have."""
    model: Any = Recipe
    if path and path[0] == "backend":
        model = NeuronBackend if data["backend"].get("name") == "neuron" else InductorBackend
        path = path[1:]
    for part in path:
        if not part.isdigit():
            field = next((f for n, f in model.model_fields.items() if (f.alias or n) == part), None)
            model = _section(field.annotation) if field else Recipe
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _section(annotation: Any) -> Any:
    """The model class inside an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section(argument)
        if found is not Recipe:
            return found
    return Recipe
