"""Read the rotary embedding of a `config.json`, in the layouts of transformers 4 and 5. Imports no torch.

`rope_scaling`, if not empty, replaces `rope_parameters` as a whole, as in transformers; `rope_theta` beside them is the
theta of the one that has none. `rope_kinds` has what the kinds of scaling mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.models.config import Limit
from pipeline.models.fields import Fields
from pipeline.models.layer_types import FULL, LAYER_TYPES, SLIDING
from pipeline.models.rope_kinds import LENGTH_DEPENDENT, ORIGINAL, RopeObject, scaled
from pipeline.models.rope_types import ProportionalRope, Rope

LAYOUTS = ("rope_scaling", "rope_parameters")
PARTIAL = "partial_rotary_factor"
PROPORTIONAL = "proportional"
THETA = "rope_theta"


@dataclass(frozen=True)
class RopeRules:
    """What a family's class makes of rotary embeddings.

    `partial`: the default of `partial_rotary_factor`; None if its attention turns whole heads only. `older_names`:
    kinds that it reads as another one. `local`: it has another rotary embedding for layers with a window; the field of
    its theta in the layout of transformers 4, where it has one, and the default of that theta. `absent`: the object of
    a config that has none, by the type of layers where they differ. `proportional`: it knows this kind. `in_4`:
    versions 4 of transformers have the class. `fields_in_4`: the fields of a scaled one that they accept; empty: all.
    """

    theta: float = 10000.0
    partial: float | None = None
    interleaved: bool = False
    older_names: Mapping[str, str] = field(default_factory=dict)
    local: tuple[str | None, float] | None = None
    absent: Mapping[str, Any] = field(default_factory=dict)
    proportional: bool = False
    in_4: bool = True
    fields_in_4: tuple[str, ...] = ()


RULES: Mapping[str, RopeRules] = {
    "gemma3_text": RopeRules(theta=1e6, local=("rope_local_base_freq", 1e4)),
    "gemma4_text": RopeRules(
        local=(None, 1e4),
        absent={
            FULL: {"rope_type": PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
        proportional=True,
        in_4=False,
    ),
    "glm4": RopeRules(partial=0.5, interleaved=True),
    "gpt_oss": RopeRules(
        theta=150000.0,
        absent={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "llama4_text": RopeRules(theta=5e5, interleaved=True),
    "mixtral": RopeRules(theta=1e6),
    "olmo3": RopeRules(theta=5e5, local=(None, 5e5)),
    "phi3": RopeRules(
        partial=1.0,
        older_names={"su": "longrope", "yarn": "longrope"},
        fields_in_4=("type", "short_factor", "long_factor"),
    ),
    "qwen3_5_moe_text": RopeRules(partial=0.25),
    "qwen3_5_text": RopeRules(partial=0.25),
    "qwen3_next": RopeRules(partial=0.25),
    "smollm3": RopeRules(theta=2e6),
}
"""Rules of the families that differ from Llama's."""

Ropes = Mapping[str, Rope]
"""Rotary embeddings by the type of the layers."""


def rules_of(family: Any) -> RopeRules:
    """Return the rules of a family."""
    return RULES.get(family, RopeRules()) if isinstance(family, str) else RopeRules()


def read_rope(fields: Fields, head_dim: int, full: int | None = None) -> tuple[Ropes, tuple[Limit, ...]]:
    """Return the rotary embedding of each type of layers, and the lengths up to which their frequencies are constant.

    `full` is the size of heads of layers without a window, if it differs.

    Raises:
        SourceError: an unsupported kind of RoPE, or a missing or malformed field, by its name and value.

    """
    layout, rules = _layout(fields), rules_of(fields.family)
    if rules.local is not None:
        return _by_type(fields, {SLIDING: head_dim, FULL: full or head_dim}, rules)
    rope = RopeObject(fields, layout, given(fields.config, rules))
    if nested := [key for key, value in rope.values.items() if isinstance(value, Mapping)]:
        what = "rotary embeddings by layer are not supported for this family"
        raise rope.error(nested[0], rope.values[nested[0]], what, "use a model with one rotary embedding")
    one, limits = one_rope(rope, fields.config.get(THETA, rules.theta), head_dim, rules)
    return dict.fromkeys(LAYER_TYPES, one), limits


def _by_type(fields: Fields, sizes: Mapping[str, int], rules: RopeRules) -> tuple[Ropes, tuple[Limit, ...]]:
    """Read a rotary embedding for each type of layers; `rope_scaling` is of those that attend to all keys."""
    assert rules.local is not None
    by_type: Mapping[str, Any] = fields.config.get("rope_parameters") or rules.absent
    scaling: Mapping[str, Any] = fields.config.get("rope_scaling") or {}
    for kind, values in by_type.items():
        if kind not in LAYER_TYPES or not isinstance(values, Mapping | None):
            what = f"expected an object for {' and '.join(LAYER_TYPES)}"
            raise fields.error(f"rope_parameters.{kind}", values, what)
    if scaling and by_type and not by_type.get(FULL):
        raise fields.error("rope_scaling", scaling, f"rope_parameters has no {FULL}", "remove one of the two")
    older, theta = rules.local
    thetas = {FULL: fields.config.get(THETA, rules.theta), SLIDING: fields.config.get(older, theta) if older else theta}
    ropes: dict[str, Rope] = {}
    limits: list[Limit] = []
    for kind in LAYER_TYPES:
        values = {**(by_type.get(kind) or {}), **(scaling if kind == FULL else {})}
        rope = RopeObject(fields, f"rope_parameters.{kind}", values, by_layer=True)
        if rules.absent and THETA not in values:
            what = f"expected an object with {THETA} for {' and '.join(LAYER_TYPES)}"
            raise fields.error(f"rope_parameters.{kind}", by_type.get(kind), what)
        ropes[kind], found = one_rope(rope, thetas[kind], sizes[kind], rules)
        limits += found
    return ropes, tuple(limits)


def one_rope(rope: RopeObject, theta: Any, head_dim: int, rules: RopeRules) -> tuple[Rope, tuple[Limit, ...]]:
    """Return the rotary embedding of one object; `theta` is that of an object without."""
    if rules.proportional and rope.kind() == PROPORTIONAL:
        return _proportional(rope, head_dim), ()
    dim = _turned(rope, head_dim, rules)
    own = rope if THETA in rope.values else RopeObject(rope.fields, "", {THETA: theta})
    theta = own.positive(THETA)
    kind = rules.older_names.get(rope.kind(), rope.kind())
    scaling, scale = scaled(rope, kind, theta, dim)
    length = LENGTH_DEPENDENT[kind](rope) if kind in LENGTH_DEPENDENT else None
    limits = () if length is None else (Limit(f"{rope.layout}.{kind}", length),)
    return Rope(theta, dim, scaling, scale, rules.interleaved), limits


def _proportional(rope: RopeObject, head_dim: int) -> Rope:
    """Return the rotary embedding that turns a part of the pairs, at the frequencies of the whole head."""
    share = rope.positive(PARTIAL, 1.0)
    if share > 1:
        raise rope.error(PARTIAL, share, "expected at most 1")
    return Rope(
        rope.positive(THETA), head_dim, ProportionalRope(int(share * head_dim // 2), rope.positive("factor", 1.0))
    )


def given(config: Mapping[str, Any], rules: RopeRules) -> Mapping[str, Any]:
    """Return the rotary embedding of a config, in either layout, or that of the family's class if there is none."""
    rope: Mapping[str, Any] | None = config.get("rope_scaling") or config.get("rope_parameters")
    return rules.absent if rope is None else rope


def _layout(fields: Fields) -> str:
    """Return the name of the object that transformers reads."""
    for name in LAYOUTS:
        value = fields.config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise fields.error(name, value, "expected an object or null")
    return "rope_scaling" if fields.config.get("rope_scaling") else "rope_parameters"


def _turned(rope: RopeObject, head_dim: int, rules: RopeRules) -> int:
    """Return how many values of a head turn: those of `partial_rotary_factor`, inside the object or beside it."""
    outside = RopeObject(rope.fields, "", rope.fields.config)
    found = [one for one in (rope, outside) if PARTIAL in one.values]
    if rules.partial is None:
        for one in found:
            if one.values[PARTIAL] not in (None, 1):
                what = "partial rotary embeddings are not supported"
                raise one.error(PARTIAL, one.values[PARTIAL], what, "use a model without them")
        return head_dim
    factors = [one.positive(PARTIAL) for one in found] or [rules.partial]
    dim = int(head_dim * factors[0])
    if factors[0] > 1 or dim < 2 or dim % 2 or len(set(factors)) > 1:
        what = f"expected one factor up to 1 by which head_dim={head_dim} becomes an even number"
        raise found[0].error(PARTIAL, factors[-1], what) if found else rope.fields.error("head_dim", head_dim, what)
    return dim


def in_both_layouts(config: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    """Return a config whose rotary embedding transformers 4.57 reads as transformers 5 does.

    4.57 does not know `rope_parameters`, and fills in no `original_max_position_embeddings`: `max_position` is its
    default.
    """
    rules = rules_of(config.get("model_type"))
    if not rules.in_4:
        return dict(config)
    if rules.local is not None:
        return _both_by_type(config, rules)
    rope: dict[str, Any] = dict(given(config, rules))
    rest = {key: value for key, value in config.items() if key not in LAYOUTS}
    if not rope and not rules.absent:
        return rest
    rope.setdefault("rope_type", rope.get("type", "default"))
    kind = rules.older_names.get(rope["rope_type"], rope["rope_type"])
    rope.setdefault(THETA, config.get(THETA, rules.theta))
    if kind in ("llama3", "yarn", "longrope"):
        rope.setdefault(ORIGINAL, config.get(ORIGINAL, max_position))
    if rope.get(PARTIAL) is not None:
        rest[PARTIAL] = rope[PARTIAL]
    rest |= {THETA: rope[THETA], "rope_parameters": rope}
    if kind == "default" and not rules.absent:  # else 4.57 takes the one of a config without
        return rest
    if kind == "longrope" and rope.get("factor") is None:
        rest.setdefault(ORIGINAL, rope[ORIGINAL])  # by which 4.57 computes the factor
    if kind == "longrope" and rules.fields_in_4:
        return rest | {"rope_scaling": {key: (rope | {"type": kind})[key] for key in rules.fields_in_4}}
    return rest | {"rope_scaling": rope}


def _both_by_type(config: Mapping[str, Any], rules: RopeRules) -> dict[str, Any]:
    """Add the fields of transformers 4 to rotary embeddings by type of layers, which 5 reads as well."""
    assert rules.local is not None
    ropes: Mapping[str, Any] = config.get("rope_parameters") or {}
    whole = dict(config)
    if THETA in (full := ropes.get(FULL) or {}):
        whole[THETA] = full[THETA]
    elif not ropes:
        whole.setdefault(THETA, rules.theta)  # that of Olmo 3 is another one in 4.57
    if full.get("rope_type", full.get("type", "default")) != "default":
        whole.setdefault("rope_scaling", dict(full))
    local = ropes.get(SLIDING) or {}
    if THETA in local and rules.local[0]:
        whole[rules.local[0]] = local[THETA]
    return whole
