"""A string where a list is expected is rejected: Python iterates over its characters, so the mistake shows nowhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import addresses, extras
from pipeline.artifact import manifest, sbom, verify
from pipeline.backends.inductor import compiler as inductor
from pipeline.backends.neuron import compiler
from pipeline.cli import facts, paths
from pipeline.cli.publish import PublishOptions
from pipeline.distill.prompts import HeldOutFilter
from pipeline.distill.settings import DistillSettings
from pipeline.errors import InputError, no_string
from pipeline.graphs.arguments import GREEDY
from pipeline.measure import bench, tune
from pipeline.models.generation import GenerationDefaults
from pipeline.nxdi import vllm_args, vllm_cache, vllm_cache_layout
from pipeline.plan.estimates import pace_of
from pipeline.plan.forecast import Forecast
from pipeline.recipe import changed
from pipeline.registry import copy, promotions, publish, pull
from pipeline.runtime.calls import checked_prompts
from pipeline.runtime.engine import Engine
from pipeline.serve import arguments
from pipeline.serve.requests import RequestSlots
from pipeline.serve.settings import request_defaults
from pipeline.sources import checkpoint, pointers, tensors
from pipeline.stages.took import BuildClock
from pipeline.stores.hub import HubStore
from pipeline.stores.objects import ObjectStore
from pipeline.stores.oci import OciStore
from pipeline.validate import lengths
from pipeline.validate import run as validation
from pipeline.validate.draft import examine, short
from pipeline.validate.gates import acceptance
from pipeline.validate.reference import skeleton
from support.python_source import tree

PACKAGE = Path(__file__).parents[1] / "pipeline"
TEXT = "text"
UNUSED: Any = SimpleNamespace()
"""In the place of arguments that are not looked at before the list is."""

ENGINE_MANIFEST: Any = SimpleNamespace(
    shapes=SimpleNamespace(batch=(1,), kv=(8,)), graphs=(), sampling=("greedy",), draft_tokens=(1,), step_costs=None,
    pair=SimpleNamespace(candidates=None), logprobs=0, vocab=8,
)  # fmt: skip
FILES: Any = SimpleNamespace(files={})
BATCH: Any = SimpleNamespace(draft_length_policy=lambda: None)


def generate(prompts: Any) -> object:
    return Engine(ENGINE_MANIFEST, UNUSED, UNUSED).generate(prompts, max_new_tokens=1)


def settings_lines(sampling: Any) -> object:
    return list(facts.settings_lines(GenerationDefaults(), GREEDY, sampling, given=False))


def expect(missing: Any) -> object:
    clock = BuildClock.__new__(BuildClock)
    return clock.expect(missing, 1)


def draft_report(prompts: Any) -> object:
    pair: Any = (UNUSED, SimpleNamespace(config=SimpleNamespace(eagle3=UNUSED)))
    return validation.draft_report(UNUSED, pair, prompts, UNUSED, print, UNUSED)


def distil(**values: Any) -> object:
    return DistillSettings(UNUSED, Path(), Path("out"), **values)


FUNCTIONS: dict[str, Callable[[Any], object]] = {
    "addresses.misspelt(schemes)": lambda value: addresses.misspelt("s3://bucket", value),
    "artifact.manifest.part(only)": lambda value: manifest.part(FILES, value, "here"),
    "artifact.manifest.select(only)": lambda value: manifest.select(FILES, value),
    "artifact.sbom.installed(roots)": sbom.installed,
    "artifact.verify.verify(only)": lambda value: verify.verify(Path("none"), only=value),
    "artifact.verify.verify_files(only)": lambda value: verify.verify_files(UNUSED, only=value),
    "backends.inductor.compiler.failure(command)": lambda value: inductor.failure(UNUSED, value, ""),
    "backends.neuron.compiler.compile_neff(flags)": lambda value: compiler.compile_neff(b"", value, Path("none"), {}),
    "cli.paths.file_patterns(parts)": paths.file_patterns,
    "cli.publish.PublishOptions.places(roots)": lambda value: PublishOptions.places(UNUSED, value),
    "cli.facts.settings_lines(sampling)": settings_lines,
    "distill.prompts.HeldOutFilter.__init__(held_out)": HeldOutFilter,
    "extras.require(extras)": lambda value: extras.require(value, "here"),
    "measure.tune.tune(prompts)": lambda value: tune.tune(UNUSED, value, 1, 1, print),
    "models.generation.GenerationDefaults.not_applied(sampling)": GenerationDefaults().not_applied,
    "nxdi.vllm_cache.absent(expects)": lambda value: vllm_cache.absent(value, [], "here"),
    "nxdi.vllm_cache.absent(found)": lambda value: vllm_cache.absent([], value, "here"),
    "nxdi.vllm_cache.shown(faults)": vllm_cache.shown,
    "nxdi.vllm_cache_layout.entries(only)": lambda value: vllm_cache_layout.entries(Path("none"), value),
    "nxdi.vllm_args.shell_line(command)": lambda value: vllm_args.shell_line({}, value),
    "plan.estimates.pace_of(flags)": pace_of,
    "plan.forecast.Forecast.compile_s(names)": lambda value: Forecast({}, {}, 0, 0).compile_s(1, value),
    "recipe.changed.changed_recipes(paths)": changed.changed_recipes,
    "registry.copy.copied(missing)": lambda value: copy.copied(UNUSED, UNUSED, value, is_there=False),
    "registry.promotions.promotions_by_version(versions)": lambda v: promotions.promotions_by_version("url", "name", v),
    "registry.publish.listed_places(roots)": publish.listed_places,
    "registry.publish.publish(aliases)": lambda value: publish.publish([], "url", value),
    "registry.publish.publish(roots)": lambda value: publish.publish(value, "url"),
    "registry.publish.publish_all(places)": lambda value: publish.publish_all([], value),
    "registry.publish.publish_all(roots)": lambda value: publish.publish_all(value, []),
    "registry.publish.send_missing(missing)": lambda value: publish.send_missing(UNUSED, UNUSED, value, UNUSED),
    "runtime.calls.checked_prompts(prompts)": checked_prompts,
    "runtime.engine.Engine.generate(prompts)": generate,
    "serve.requests.RequestSlots.drop(names)": lambda value: RequestSlots(BATCH).drop(value),
    "serve.settings.request_defaults(sampling)": lambda value: request_defaults({}, {}, value),
    "sources.checkpoint.digest_files(names)": lambda value: checkpoint.digest_files(Path(), value, None, UNUSED),
    "sources.checkpoint.refuse_without_weights(names)": lambda value: checkpoint.refuse_without_weights(value, "here"),
    "sources.pointers.reject_pointers(names)": lambda value: pointers.reject_pointers(Path(), value),
    "sources.tensors.layout(tensors)": lambda value: tensors.layout(value, {}),
    "stores.hub.HubStore.send(paths)": lambda value: HubStore.send(UNUSED, UNUSED, value, UNUSED),
    "stores.oci.OciStore.send(paths)": lambda value: OciStore.send(UNUSED, UNUSED, value, UNUSED),
    "stores.objects.ObjectStore.send(paths)": lambda value: ObjectStore.send(UNUSED, UNUSED, value, UNUSED),
    "serve.arguments.restrict(engine)": lambda value: arguments.restrict(UNUSED, value, UNUSED),
    "stages.took.BuildClock.expect(missing)": expect,
    "validate.draft.examine.chosen(prompts)": lambda value: examine.chosen(value, 1),
    "validate.draft.short.short_prompts(prompts)": short.short_prompts,
    "validate.gates.acceptance.acceptance_of(prompts)": lambda value: acceptance.acceptance_of(value, [], 1),
    "validate.lengths.encoded_prompts(prompts)": lambda value: lengths.encoded_prompts(value, {}),
    "validate.reference.skeleton.for_module(names)": lambda value: skeleton.for_module(value, {}, UNUSED),
    "validate.run.draft_report(prompts)": draft_report,
    "validate.lengths.token_counts(prompts)": lambda value: lengths.token_counts(value, {}),
}
OTHERS: dict[str, Callable[[Any], object]] = {
    "distill.settings.DistillSettings(layers)": lambda value: distil(layers=value),
    "distill.settings.DistillSettings(text)": lambda value: distil(text=value),
    "measure.bench.interleaved(prompts)": lambda value: bench.interleaved({}, value),
    "nxdi.vllm_cache.ServerRun(expects)": lambda value: vllm_cache.ServerRun([], {}, {}, value),
    "nxdi.vllm_cache.ServerRun(serve)": lambda value: vllm_cache.ServerRun(value, {}, {}),
    "registry.publish.Place(aliases)": lambda value: publish.Place("url", value),
    "registry.pull.Selection(only)": pull.Selection,
}
"""Fields of settings, and lists of token ids."""

LISTS = ("Sequence", "Iterable", "Collection", "list")
TEXTS = r"\b(str|Path|Prompt|Place)\b"
INTERFACES = {"stores.base.Store.send(paths)"}
"""Without a body; the classes that implement them are listed."""


@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHERS])
def test_string_in_place_of_a_list_is_rejected(name):
    """`Engine.generate("hello")` answered five prompts, a letter each, and `publish(aliases="prod")` set four."""
    call = (FUNCTIONS | OTHERS)[name]
    with pytest.raises(InputError) as caught:
        call(TEXT)
    assert caught.value.where == name.rpartition("(")[2].rstrip(")")
    assert caught.value.what.startswith("found a string, expected a list of ")
    assert caught.value.fix == 'write ["text"]'


def test_every_public_function_with_a_list_of_texts_is_tested():
    """A new function that takes such a list comes with `no_string` and a line in this file."""
    names = {name for path in PACKAGE.rglob("*.py") for name in _list_parameters(path)}
    assert names - INTERFACES == FUNCTIONS.keys()


@pytest.mark.parametrize(("value", "fix"), [("a" * 99, f'write ["{"a" * 60}"]'), ('a"é', 'write ["a\\"é"]')])
def test_no_string_shows_what_to_write(value, fix):
    with pytest.raises(InputError) as caught:
        no_string(value, "names", "names")
    assert caught.value.fix == fix


@pytest.mark.parametrize("value", [None, (), [], ["text"], iter(["text"])])
def test_no_string_passes_lists(value):
    no_string(value, "names", "names")


def test_generate_with_the_token_ids_of_one_prompt_is_rejected():
    """It failed with `'int' object is not iterable`."""
    with pytest.raises(InputError) as caught:
        generate([1, 2, 3])
    assert caught.value.what == "found the token id 1, expected a list of prompts: texts, or lists of token ids"
    assert (caught.value.where, caught.value.fix) == ("prompts", "write [[1, ...]]")


def _list_parameters(path: Path) -> list[str]:
    """Parameters of public functions of a module that are lists of text, of paths, or of prompts."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    module_tree = tree(path.read_text())
    classes = {
        item: f"{node.name}." for node in module_tree.body if isinstance(node, ast.ClassDef) for item in node.body
    }
    functions = [item for item in (*module_tree.body, *classes) if isinstance(item, ast.FunctionDef)]
    return [
        f"{module}.{classes.get(function, '')}{function.name}({argument.arg})"
        for function in functions
        if not function.name.startswith("_") or function.name == "__init__"
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None and _is_list_of_texts(argument.annotation)
    ]


def _is_list_of_texts(annotation: ast.expr) -> bool:
    lists = [node for node in ast.walk(annotation) if isinstance(node, ast.Subscript)]
    items = [ast.unparse(node.slice) for node in lists if ast.unparse(node.value) in LISTS]
    return any(re.search(TEXTS, item) and "dict" not in item for item in items)
