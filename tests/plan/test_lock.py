"""Locks: what is written reads back, what drifted is named with both values, and configs alone are enough to plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import __version__
from pipeline.backends.base import make_backend
from pipeline.errors import InputError
from pipeline.files.atomic import FileDigest
from pipeline.models.families import config_of
from pipeline.plan import lock as locks
from pipeline.plan.lock import Lock, LockedSource
from pipeline.recipe import load
from pipeline.sources.pair import resolve_pair
from support.paths import ROOT

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
COMMIT = "6f6073b423013f6a7d4d9f39144961bfbfbc386b"
TARGET = LockedSource(
    f"hf://org/big@{COMMIT}",
    COMMIT,
    {"config.json": FileDigest("a" * 64, 700), "model.safetensors": FileDigest("b" * 64, 9000)},
    {"model_type": "llama", "num_hidden_layers": 4, "rms_norm_eps": 1e-05},
)
DRAFT = LockedSource("./draft", "sha256:1", {"model.safetensors": FileDigest("c" * 64, 500)}, {"model_type": "llama"})
LOCK = Lock("d" * 64, TARGET, DRAFT, {"backend": "inductor", "torch": "2.13.0"})
RECIPE = """\
name: pair
target: {source: "pico://llama"}
draft: {derive: {from: target, layers: [0, 2]}}
speculation: {draft_tokens: [2]}
shapes: {batch: [1], prefill: [32], kv: [64]}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "pair.yaml"
    path.write_text(text)
    return path


def keys(problems: list[locks.Problem]) -> list[str]:
    return [problem.where.removeprefix("lock: ") for problem in problems]


def test_write_reads_back_equal(tmp_path: Path) -> None:
    locks.write(tmp_path / "pair.lock", LOCK)
    assert locks.read(tmp_path / "pair.lock") == LOCK
    assert [path.name for path in tmp_path.iterdir()] == ["pair.lock"]


def test_write_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    shuffled = replace(LOCK, toolchain=dict(reversed(LOCK.toolchain.items())))
    assert locks.to_bytes(LOCK) == locks.to_bytes(shuffled)
    assert locks.digest(LOCK) == locks.digest(shuffled)


def test_digest_sees_every_part() -> None:
    others = [
        replace(LOCK, recipe_sha256="e" * 64),
        replace(LOCK, target=replace(TARGET, revision="0" * 40)),
        replace(LOCK, draft=None),
        replace(LOCK, toolchain={}),
    ]
    assert len({locks.digest(lock) for lock in [LOCK, *others]}) == 5


def test_read_missing_says_how_to_lock(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        locks.read(tmp_path / "pair.lock")
    assert caught.value.fix == f"run: tandem recipe lock {tmp_path / 'pair.yaml'}"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 2}, "version"),
        ({"recipe_sha256": 5}, "recipe_sha256"),
        ({"target": None}, "target"),
        ({"target": {"source": "x"}}, "target.revision"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_read_damaged_names_the_key(tmp_path: Path, change: dict[str, object], where: str) -> None:
    path = tmp_path / "pair.lock"
    path.write_text(json.dumps(json.loads(locks.to_bytes(LOCK)) | change))
    with pytest.raises(InputError) as caught:
        locks.read(path)
    assert caught.value.where == f"{path}: {where}"
    assert "tandem recipe lock" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [('{"version": 1,\n "version": 1}', "2: version", "key given twice"),
     ('{"version": 1,\n "target": {', "2:13", "not YAML"),
     ("[1]", "1", "not a mapping")],
)  # fmt: skip
def test_read_text_that_is_no_lock_names_the_line(tmp_path: Path, text: str, where: str, what: str) -> None:
    path = tmp_path / "pair.lock"
    path.write_text(text)
    with pytest.raises(InputError, match=what) as caught:
        locks.read(path)
    assert caught.value.where == f"{path}:{where}"


def test_read_yaml_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "pair.lock"
    path.write_text(f"version: 1\nrecipe_sha256: abc\ntarget: {{source: './a', revision: '{COMMIT}'}}\n")
    assert locks.read(path) == Lock("abc", LockedSource("./a", COMMIT))


def test_check_locked_same_is_clean() -> None:
    assert locks.check_locked(LOCK, LOCK) == []


def test_check_locked_names_each_drifted_item_with_both_values() -> None:
    target = replace(TARGET, revision="0" * 40, files=TARGET.files | {"model.safetensors": FileDigest("f" * 64, 9001)})
    fresh = Lock("9" * 64, target, DRAFT, {"backend": "inductor", "torch": "2.14.0"})
    problems = locks.check_locked(LOCK, fresh)
    assert keys(problems) == ["recipe_sha256", "target.revision", "target.files.model.safetensors", "toolchain.torch"]
    assert problems[1].what == f"locked {COMMIT}, found {'0' * 40}"
    assert "f" * 64 in problems[2].what
    assert "b" * 64 in problems[2].what
    assert problems[3].what == "locked 2.13.0, found 2.14.0"


HERE = {"backend": "inductor", "torch": "2.13.0+cpu", "cxx": "12.2.0", "machine": "x86_64", "isa": "avx2"}
ELSEWHERE = HERE | {"torch": "2.13.0", "cxx": "13.3.0", "isa": "avx512"}
FLAGS = {"device": "cpu", "isa": "native", "kernel": "0a1b2c"}


def made(toolchain: dict[str, str], flags: dict[str, str] = FLAGS) -> Lock:
    """A lock as a machine with this toolchain makes it."""
    return locks.with_toolchain(LOCK, toolchain, flags)


def test_lock_pins_versions_and_flags_and_no_fact_of_a_machine() -> None:
    """It pinned the C++ compiler's patch version and the processor's instruction set."""
    lock = made(HERE)
    assert lock.toolchain == {
        "tandem": __version__, "backend": "inductor", "torch": "2.13.0", "machine": "x86_64",
    }  # fmt: skip
    assert lock.flags == {"device": "cpu", "isa": "native"}
    assert lock.made_with == {"cxx": "12.2.0", "isa": "avx2"}


def test_lock_of_an_incomplete_toolchain_pins_none_of_its_versions() -> None:
    """Made without the Neuron SDK, a lock had `neuronx-cc: missing`, and another torch than that of the SDK."""
    lock = made({"backend": "neuron", "torch": "2.13.0", "neuronx-cc": "missing"})
    assert lock.toolchain == {"tandem": __version__, "backend": "neuron"}
    sdk = {"backend": "neuron", "torch": "2.9.1", "neuronx-cc": "2.26.1+ab"}
    assert locks.check_locked(lock, made(sdk)) == []
    assert made(sdk).toolchain["neuronx-cc"] == "2.26.1"


def test_check_locked_passes_on_another_machine_and_says_what_differs() -> None:
    """A lock of a laptop failed in CI: `toolchain.cxx: locked 13.3.0, found 12.2.0`."""
    assert locks.check_locked(made(ELSEWHERE), made(HERE)) == []
    assert locks.unpinned(made(ELSEWHERE), made(HERE)) == "cxx 12.2.0 (lock: 13.3.0), isa avx2 (lock: avx512)"
    assert locks.unpinned(made(HERE), made(HERE)) == ""


def test_check_locked_of_a_lock_from_before_does_not_pin_the_machine() -> None:
    earlier = replace(LOCK, toolchain=ELSEWHERE | {"torch": "2.13.0+cpu"})
    assert locks.check_locked(earlier, made(HERE)) == []
    assert locks.unpinned(earlier, made(HERE)) == "cxx 12.2.0 (lock: 13.3.0), isa avx2 (lock: avx512)"


@pytest.mark.parametrize(
    ("change", "key"),
    [({"torch": "2.14.0"}, "toolchain.torch"), ({"machine": "aarch64"}, "toolchain.machine"),
     ({"tandem": "9.9.9"}, "toolchain.tandem")],
)  # fmt: skip
def test_check_locked_rejects_another_version(change: dict[str, str], key: str) -> None:
    fresh = made(HERE)
    assert keys(locks.check_locked(made(HERE), replace(fresh, toolchain=fresh.toolchain | change))) == [key]


def test_check_locked_rejects_other_flags_in_both_directions() -> None:
    """A variable of the environment that changes the code is a flag, which the lock may lack."""
    assert keys(locks.check_locked(made(HERE), made(HERE, FLAGS | {"isa": "avx2"}))) == ["flags.isa"]
    assert keys(locks.check_locked(made(HERE), made(HERE, FLAGS | {"env.XLA_FLAGS": "-x"}))) == ["flags.env.XLA_FLAGS"]
    assert keys(locks.check_locked(made(HERE, FLAGS | {"env.XLA_FLAGS": "-x"}), made(HERE))) == ["flags.env.XLA_FLAGS"]


def test_check_locked_of_empty_sections_pins_neither() -> None:
    assert locks.check_locked(replace(LOCK, toolchain={}, flags={}), made(HERE)) == []


def test_check_locked_added_and_missing_files() -> None:
    files = {"config.json": TARGET.files["config.json"], "extra.safetensors": FileDigest("1" * 64, 1)}
    problems = locks.check_locked(LOCK, replace(LOCK, target=replace(TARGET, files=files)))
    assert keys(problems) == ["target.files.extra.safetensors", "target.files.model.safetensors"]
    assert problems[0].what.startswith("locked no such file, found sha256 1111")


def test_check_locked_config_alone_lets_weights_come() -> None:
    """A lock made without weights pins them by the commit."""
    config_only = replace(LOCK, target=replace(TARGET, files={"config.json": TARGET.files["config.json"]}))
    assert locks.check_locked(config_only, LOCK) == []


def test_check_locked_draft_replaced_by_derived() -> None:
    (problem,) = locks.check_locked(LOCK, replace(LOCK, draft=None))
    assert problem.what == "locked ./draft, found a draft derived from the target"


def test_check_locked_refuses_a_branch() -> None:
    floating = replace(LOCK, target=replace(TARGET, source="hf://org/big@main", revision="main"))
    (problem,) = locks.check_locked(floating, floating)
    assert problem.where == "lock: target.revision"
    assert "can move" in problem.what


def test_make_lock_of_a_derived_pair_gives_back_its_configs(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    target, draft = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "cache")
    lock = locks.make_lock(recipe, target, draft, {"backend": "inductor"}, {})
    locks.write(tmp_path / "pair.lock", lock)
    read = locks.read(tmp_path / "pair.lock")
    assert read == lock
    assert read.draft is None
    assert locks.pair_configs(recipe, read, "lock") == (target.config, draft.config)


def test_pair_configs_layer_that_is_not_there(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path, RECIPE.replace("[0, 2]", "[0, 7]")))
    lock = Lock(recipe.digest(), replace(TARGET, source="pico://llama", config={"model_type": "llama", **SIZES}))
    with pytest.raises(InputError) as caught:
        locks.pair_configs(recipe, lock, "lock")
    assert caught.value.what == "the target has no layer 7"
    assert caught.value.where.endswith("pair.yaml:3: draft.derive.layers")


def test_pair_configs_derived_from_a_target_without_a_number_of_layers(tmp_path: Path) -> None:
    """Was: KeyError; the default of Llama is 32 layers."""
    recipe = load(write_recipe(tmp_path, RECIPE.replace("[0, 2]", "[0, 31]")))
    config = {"model_type": "llama", **SIZES}
    del config["num_hidden_layers"]
    lock = Lock(recipe.digest(), replace(TARGET, source="pico://llama", config=config))
    target, draft = locks.pair_configs(recipe, lock, "lock")
    assert (target.layers, draft.layers) == (32, 2)


SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def test_pair_configs_lock_of_another_source_is_refused(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    with pytest.raises(InputError) as caught:
        locks.pair_configs(recipe, Lock(recipe.digest(), TARGET), "lock")
    assert caught.value.fix.endswith(f"tandem recipe lock {tmp_path}/pair.yaml")


def test_relock_keeps_the_pins_of_a_changed_recipe(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    lock = Lock("0" * 64, replace(TARGET, source="pico://llama"))
    again = locks.relock(recipe, lock)
    assert again.recipe_sha256 == recipe.digest()
    assert again.target == lock.target


def test_relock_other_source_is_refused(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    with pytest.raises(InputError) as caught:
        locks.relock(recipe, Lock("0" * 64, TARGET))
    assert "the recipe has pico://llama, the lock has hf://org/big" in caught.value.what


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_lock_belongs_to_its_recipe(path: Path) -> None:
    recipe, lock = load(path), locks.read(locks.lock_path(path))
    assert lock.recipe_sha256 == recipe.digest(), f"run: tandem recipe lock {path.stem}"
    assert lock.target.source == recipe.target.source
    assert not lock.target.floating
    assert lock.draft is None or not lock.draft.floating
    config_of(lock.target.config, path.stem)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_lock_pins_versions_and_flags(path: Path) -> None:
    """The locks of the Trainium recipes pinned none, and those for a CPU had lines that were deleted by hand."""
    recipe, lock = load(path), locks.read(locks.lock_path(path))
    backend = make_backend(recipe.backend)
    now = locks.with_toolchain(lock, backend.toolchain().as_dict(), backend.flags())
    drift = set(keys(locks.check_locked(lock, now))) - {"toolchain.machine"}
    assert drift == set(), f"run: tandem recipe lock {path.stem}"
    assert {"tandem", "backend"} <= lock.toolchain.keys()
    assert lock.flags == now.flags
    assert lock.toolchain.keys().isdisjoint(locks.MACHINE_FACTS)
