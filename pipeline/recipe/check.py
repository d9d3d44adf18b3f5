"""Document -> Recipe, or every problem of the document: location, value found, values accepted, fix."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from pipeline.errors import Problem, RecipeError
from pipeline.models.draft_kind import DRAFT_KINDS
from pipeline.models.weights import NarrowWeights
from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings, UnacceptedError
from pipeline.recipe.chips import CHIPS
from pipeline.recipe.document import Document, Key, dotted
from pipeline.recipe.readings import LISTED, READINGS, TAP_WORDS, UNREAD
from pipeline.recipe.schema import (
    BASE_DESCRIPTION,
    Recipe,
    Shapes,
    Speculation,
    Validate,
)
from pipeline.recipe.step_costs import BY_BATCH, BY_TOKENS, StepCosts, by_shape

Section = TypeVar("Section", bound=BaseModel)
Finding = tuple[Key, str, str]
"""Key, problem and fix."""

EXPECTED = {
    "string_type": "text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list, like [1, 4]",
    "dict_type": "a mapping, `key: value`",
    "model_type": "a mapping, `key: value`",
    "model_attributes_type": "a mapping, `key: value`",
}
OTHER_NUMBER = re.compile(r"[1-9][0-9]*(_[0-9]+)+|0b[01_]*[01]")
"""Integers of other languages and of YAML 1.1, which YAML 1.2 reads as text."""

GLUED = re.compile(r"(?P<key>[a-z_]+):(?P<value>[^\s/].*)")
"""A key and a value without a space between them, which YAML reads as one text."""

OTHER_NAMES = {
    "gpu": "cuda", "nvidia": "cuda", "trainium": "neuron", "trn": "neuron", "aotinductor": "inductor",
    "torch": "inductor", "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16",
    "bf16": "bfloat16", "eagle": "eagle3", "eagle-3": "eagle3", "peagle": "p_eagle",
    "p-eagle": "p_eagle", "random": "stochastic", "sample": "stochastic",
}  # fmt: skip
"""Usual names of accepted values, which are not similar in spelling."""

NOT_FINITE = {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}
"""As Python writes a number -> as YAML writes it."""

PLACE = re.compile(r"(?P<file>.*?):(?P<line>\d+)(:\d+)?(: [^/]*)?")
FOLLOWS = "default_factory_not_called"
"""The error of a default that depends on a value with an error of its own."""

LIMITS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "string_too_short": ("min_length", "text with a length of at least"),
}


def parse(document: Document) -> Recipe:
    """Return the recipe of a document.

    Raises:
        RecipeError: every problem, in the order of the file.

    """
    findings: list[Finding] = []
    recipe = None
    try:
        # From JSON, so that pydantic is strict about types and still takes lists for tuples.
        recipe = Recipe.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        own = [item for item in error.errors(include_url=False) if item["type"] != FOLLOWS]
        findings += [_explain(dict(item), document.data) for item in own]
    findings += cross_checks(document.data)
    reported = tuple(problem.where for problem in document.problems)
    found = [Problem(document.place(key), what, fix) for key, what, fix in findings]
    is_new = [not any(where.startswith(problem.where) for where in reported) for problem in found]
    problems = document.problems + list(compress(found, is_new))
    if recipe is None or problems:
        raise RecipeError(sorted(problems, key=_line))
    return recipe


def _line(problem: Problem) -> tuple[str, int]:
    match = PLACE.fullmatch(problem.where)
    return (match["file"], int(match["line"])) if match else (problem.where, 0)


def cross_checks(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield conflicts between keys; invalid sections are left out."""
    shapes, speculation = _section(Shapes, data, "shapes"), _section(Speculation, data, "speculation")
    validate = _section(Validate, data, "validate")
    if speculation:
        yield from _sampling_conflicts(speculation)
        yield from _reading_conflicts(speculation, data.get("draft"))
    if shapes:
        yield from _shape_conflicts(shapes, speculation, validate)
    yield from _backend_conflicts(data)


def _sampling_conflicts(speculation: Speculation) -> Iterator[Finding]:
    if speculation.candidates is not None and "stochastic" not in speculation.sampling:
        what = f"found {speculation.candidates}, but only stochastic graphs use candidates and none is built"
        yield ("speculation", "candidates"), what, "add stochastic to speculation.sampling, or remove candidates"
    if speculation.logprobs is not None and "shaped" not in speculation.sampling:
        what = f"found {speculation.logprobs}, but only shaped graphs report log probabilities and none is built"
        yield ("speculation", "logprobs"), what, "add shaped to speculation.sampling, or remove logprobs"
    if "shaped" in speculation.sampling and "stochastic" not in speculation.sampling:
        what = "found shaped without stochastic, whose graph proposes the drafts of shaped rows"
        yield ("speculation", "sampling"), what, "add stochastic"


def _reading_conflicts(speculation: Speculation, draft: Any) -> Iterator[Finding]:
    stated = [key for key in READINGS if isinstance(draft, dict) and draft.get(key) is not None]
    if stated and not DRAFT_KINDS[speculation.method].reads_target_states:
        what = f"found with method {speculation.method}; only a head over the target's states is read by this key"
        yield ("draft", stated[0]), what, "remove it, or write the head's method, for example method: eagle3"
        return
    if unread := [key for key in stated if key in UNREAD.get(speculation.method, ())]:
        what = f"found with method {speculation.method}, whose drafts are not read by this key"
        yield ("draft", unread[0]), what, "remove it"


def _cost_conflicts(costs: StepCosts, shapes: Shapes) -> Iterator[Finding]:
    if isinstance(costs, dict) and set(costs) != set(shapes.batch):
        what = f"found costs for the batches {sorted(costs)}; the buckets are {list(shapes.batch)}"
        yield ("speculation", "step_costs"), what, "write one list for each batch bucket, or a single list"
    for batch, by_tokens in by_shape(costs, shapes.batch, shapes.kv[-1]).items():
        if max(by_tokens) != shapes.kv[-1]:
            what = f"found costs for caches of up to {max(by_tokens)} tokens; the largest kv bucket is {shapes.kv[-1]}"
            yield ("speculation", "step_costs", batch), what, f"write {shapes.kv[-1]} in place of {max(by_tokens)}"


def _shape_conflicts(shapes: Shapes, speculation: Speculation | None, validate: Validate | None) -> Iterator[Finding]:
    longest = shapes.kv[-1]
    if speculation and speculation.step_costs:
        yield from _cost_conflicts(speculation.step_costs, shapes)
    for index, bucket in enumerate(shapes.prefill):
        if bucket >= longest:
            what = f"found {bucket}, which leaves no room in the largest kv bucket {longest}"
            yield ("shapes", "prefill", index), what, f"use prefill buckets below {longest}, or a larger kv bucket"
    for index, k in enumerate(speculation.draft_tokens if speculation else ()):
        if k + 1 >= shapes.kv[0]:
            what = f"found K={k}: a step of {k + 1} tokens does not fit the kv bucket {shapes.kv[0]}"
            yield ("speculation", "draft_tokens", index), what, f"use K below {shapes.kv[0] - 1}, or larger kv buckets"
    if validate and speculation:
        yield from _gate_conflicts(validate, speculation.draft_tokens[0])
    if validate and validate.max_new_tokens >= longest:
        what = f"found {validate.max_new_tokens}, which leaves no room for a prompt in the largest kv bucket {longest}"
        yield ("validate", "max_new_tokens"), what, f"use less than {longest}"


def _gate_conflicts(validate: Validate, least_k: int) -> Iterator[Finding]:
    """Yield limits that no step of the smallest K, which is gated too, can reach."""
    floor, rates = validate.gates.tokens_per_step, validate.gates.acceptance
    if floor is not None and floor > least_k + 1:
        what = f"found {floor:g}; a step with K={least_k} emits at most {least_k + 1} tokens"
        yield ("validate", "gates", "tokens_per_step"), what, f"use at most {least_k + 1}, or a larger K"
    if len(rates) > least_k:
        what = f"found {len(rates)} rates; the first of draft_tokens is K={least_k}"
        yield ("validate", "gates", "acceptance"), what, f"write one rate for each place of a step, K={least_k}"


def _backend_conflicts(data: Mapping[str, Any]) -> Iterator[Finding]:
    neuron, inductor = _section(NeuronSettings, data, "backend"), _section(InductorSettings, data, "backend")
    if inductor and inductor.device == "cuda" and inductor.isa != "native":
        what = f"found {_shown(inductor.isa)} with device cuda; isa applies to CPU artifacts only"
        yield ("backend", "isa"), what, "remove isa"
    backend = neuron or inductor
    models = [k for k in ("target", "draft") if isinstance(data.get(k), dict)]
    narrow = [k for k in models if data[k].get("weights") in get_args(NarrowWeights)]
    if narrow and backend and not backend.has_narrow_weights:
        what = f"found {data[narrow[0]]['weights']}; only inductor on a CPU has kernels for it"
        yield (narrow[0], "weights"), what, "remove weights"
    if neuron:
        yield from _core_conflicts(neuron, data.get("parallel"))


def _core_conflicts(neuron: NeuronSettings, parallel: Any) -> Iterator[Finding]:
    ranks = parallel.get("tensor") if isinstance(parallel, dict) else None
    cores = CHIPS[neuron.target].cores[neuron.lnc].largest_instance
    if isinstance(ranks, int) and ranks > cores:
        what = f"found {ranks}; the largest {neuron.target} instance has {cores} cores at lnc={neuron.lnc}"
        yield ("parallel", "tensor"), what, f"use at most {cores}"


def _section(model: type[Section], data: Mapping[str, Any], key: str) -> Section | None:
    """Return a section by itself; None if it is missing or invalid."""
    try:
        return model.model_validate_json(json.dumps(data[key]), strict=True) if key in data else None
    except ValidationError:
        return None


def _explain(error: dict[str, Any], data: Any) -> Finding:
    """Translate an error of pydantic into a finding."""
    key = _key(error["loc"], data)
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return key, "unknown key", _key_fix(str(key[-1]), list(_fields(key[:-1], data)))
    if kind == "missing":
        about = _fields(key[:-1], data).get(str(key[-1])) or "required"
        return key, "missing", f"add `{key[-1]}:` ({about})"
    if kind in EXPECTED:
        return key, f"found {_shown(value)}, expected {EXPECTED[kind]}", _type_fix(kind, value)
    if kind in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
        return _choice(key, error)
    if kind == "string_pattern_mismatch":
        what = f"found {_shown(value)}; accepted: lower-case letters, digits, `.`, `_`, `-`; first a letter or digit"
        return key, what, f"for example {_accepted_name(str(value))!r}"
    if kind == "finite_number":
        return key, f"found {_shown(value)}, expected a finite number", "write a number"
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error" and isinstance(cause := error["ctx"]["error"], UnacceptedError):
        return key, cause.what, cause.fix
    if kind in LIMITS:
        limit = error["ctx"][LIMITS[kind][0]]
        return key, f"found {_shown(value)}; accepted: {LIMITS[kind][1]} {limit}", f"use {LIMITS[kind][1]} {limit}"
    fix = f"see `{dotted(key)}` in docs/reference/recipe.md"
    return key, f"found {_shown(value)}; {message[:1].lower()}{message[1:]}", fix


def _accepted_name(name: str) -> str:
    """Return the accepted name that is most like `name`."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-") or "my-pair"


def _key(loc: Sequence[str | int], data: Any) -> Key:
    """Return pydantic's location without the tags of unions, which are not keys of the file."""
    key: list[str | int] = []
    for part in loc:
        if part in (LISTED, BY_BATCH, BY_TOKENS, TAP_WORDS, "[key]") or (
            isinstance(data, dict) and part not in data and data.get("name") == part
        ):
            continue
        key.append(part)
        data = _inside(data, part)
    return tuple(key)


def _inside(data: Any, part: str | int) -> Any:
    """Return the value of `data` at a key or index, or None."""
    if isinstance(data, dict):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) else None


def _choice(key: Key, error: dict[str, Any]) -> Finding:
    """Return the finding for a value that is not accepted."""
    context = error.get("ctx", {})
    accepted = str(context.get("expected") or context.get("expected_tags") or "'inductor' or 'neuron'")
    names = accepted.replace(" or ", ", ").replace("'", "").split(", ")
    if error["type"] == "literal_error":
        value = error["input"]
    else:
        key = (*key, "name")
        value = error["input"].get("name") if isinstance(error["input"], dict) else None
    what = "missing" if value is None and "tag" in error["type"] else f"found {_shown(value)}"
    other = OTHER_NAMES.get(str(value).lower())
    meant = f"did you mean {other!r}?" if other in names else _hint(str(value), names)
    fix = meant or f"use {' or '.join(names)}"
    return key, f"{what}; accepted: {', '.join(names)}", fix.strip()


def _key_fix(name: str, names: Sequence[str]) -> str:
    if glued := GLUED.fullmatch(name):
        return f"write a space after the colon: {glued['key']}: {glued['value']}"
    return f"{_hint(name, names)}keys here: {', '.join(names)}"


def _type_fix(kind: str, value: Any) -> str:
    if EXPECTED[kind].startswith("a mapping") and isinstance(value, str) and (glued := GLUED.fullmatch(value)):
        return f"write a space after the colon: {glued['key']}: {glued['value']}"
    if kind == "string_type" and isinstance(value, bool):
        return "put it in quotes: yes, no, on and off are read as true and false"
    if kind == "string_type" and isinstance(value, int | float):
        return f"put it in quotes, for example {_shown(str(value))}"
    if kind == "string_type" and value is None:
        return "write text behind the `:`; `~`, null and nothing are read as null"
    if kind == "tuple_type" and not isinstance(value, dict):
        return f"put it in brackets: [{value}]"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        plain = OTHER_NUMBER.fullmatch(value) and value.replace("_", "")
        return f"write {int(plain, 0)}, as in YAML 1.2" if plain else "write it without quotes and units"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}"
    return f"write {EXPECTED[kind]}"


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}? " if near else ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    text = NOT_FINITE.get(text, text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields(key: Key, data: Any) -> dict[str, str]:
    """Return names and descriptions of the keys of the section at `key`; empty if it is not a section."""
    model: type[BaseModel] | None = Recipe
    for part in key:
        data = _inside(data, part)
        if isinstance(part, str):
            model = _section_model(model, part, data)
    if model is None:
        return {}
    base = {} if key else {"base": BASE_DESCRIPTION}
    return base | {field.alias or name: field.description or "" for name, field in model.model_fields.items()}


def _section_model(model: type[BaseModel] | None, key: str, data: Any) -> type[BaseModel] | None:
    """Return the model of the section under a key; of several, that with the data's `name`, else the first."""
    fields = model.model_fields.items() if model else ()
    models = next((list(_models(field.annotation)) for name, field in fields if key == (field.alias or name)), [])
    chosen = data.get("name") if isinstance(data, dict) else None
    named = (
        (candidate for candidate in models if chosen in get_args(candidate.model_fields["name"].annotation))
        if chosen
        else ()
    )
    return next(iter(named), None) or next(iter(models), None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in a type: itself, or the parts of a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
