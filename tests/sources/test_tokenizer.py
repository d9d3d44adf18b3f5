"""One reading of a tokenizer: transformers on the checkpoint, every reader of an artifact's files, every command."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoTokenizer

from pipeline.cli import run as cli_run
from pipeline.distill.job import Job
from pipeline.distill.settings import DistillSettings
from pipeline.errors import SourceError
from pipeline.measure import bench, tune
from pipeline.progress import no_log
from pipeline.runtime.engine import Engine
from pipeline.runtime.text import Text
from pipeline.sources.gguf import _save_tokenizer
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import serialized, tokenizer_files
from pipeline.validate.gates.answers import encode
from pipeline.validate.lengths import longest_prompt, token_counts
from pipeline.validate.prompts import Prompt
from support import odd_tokenizers as odd
from support.commands import invoke
from support.eager import make_engine
from support.paths import ROOT
from support.python_source import nodes
from support.reports import recipe_of

MESSAGE = "hi \u4f60 there\u2028"


@pytest.fixture(scope="module", params=odd.CASES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A source, the tokenizer's folder of its artifact, and that of an artifact of older versions."""
    base = tmp_path_factory.mktemp(request.param)
    odd.CASES[request.param](base / "source")
    checkpoint = odd.checkpoint_of(base / "source")
    new, old = odd.packed(checkpoint, base / "new"), odd.packed_as_before(checkpoint, base / "old")
    reference = AutoTokenizer.from_pretrained(base / "source")
    return SimpleNamespace(source=base / "source", checkpoint=checkpoint, new=new, old=old, reference=reference)


def test_tokens_are_those_of_transformers_on_the_checkpoint(folders: SimpleNamespace) -> None:
    """With `truncation` in tokenizer.json, 19 tokens became 6; with `padding`, 3 became 12; not in the server."""
    served = AutoTokenizer.from_pretrained(folders.new)
    new, old = Text(folders.new), Text(folders.old)
    for text in odd.TEXTS:
        for special in (True, False):
            wanted = folders.reference(text, add_special_tokens=special)["input_ids"]
            assert new.encode(text, special=special) == wanted, text
            assert old.encode(text, special=special) == wanted, text
            assert served(text, add_special_tokens=special)["input_ids"] == wanted, text


def test_decoded_text_is_that_of_transformers(folders: SimpleNamespace) -> None:
    served, new = AutoTokenizer.from_pretrained(folders.new), Text(folders.new)
    for text in odd.TEXTS:
        tokens = folders.reference(text)["input_ids"]
        wanted = folders.reference.decode(tokens, skip_special_tokens=True)
        assert new.decode(tokens) == served.decode(tokens, skip_special_tokens=True) == wanted, text


def test_chat_is_that_of_transformers(folders: SimpleNamespace) -> None:
    """A class's default tokens were missing in templates, and settings such as `add_bos_token` were true in them."""
    new, reference = Text(folders.new), folders.reference
    assert new.has_chat == bool(reference.chat_template)
    if not new.has_chat:
        return
    messages = [{"role": "user", "content": MESSAGE}]
    wanted = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    served = AutoTokenizer.from_pretrained(folders.new)
    assert new.chat_text(MESSAGE) == wanted
    assert served.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == wanted
    tokens = reference(wanted, add_special_tokens=False)["input_ids"]
    assert new.chat(MESSAGE) == tokens
    if reference.bos_token_id is not None:
        assert tokens[:2] != [reference.bos_token_id] * 2


def test_special_tokens_are_those_of_transformers(folders: SimpleNamespace) -> None:
    served = AutoTokenizer.from_pretrained(folders.new)
    assert served.special_tokens_map == folders.reference.special_tokens_map
    assert set(served.all_special_ids) == set(folders.reference.all_special_ids)


def test_files_of_an_artifact_have_no_state_of_single_calls(folders: SimpleNamespace) -> None:
    """vLLM rejects a length above `model_max_length`, so an artifact of a source with a small one did not start."""
    data = json.loads((folders.new / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folders.new / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert data["truncation"] is None
    assert data["padding"] is None
    settings = {"model_max_length", "max_length", "truncation_side", "padding_side", "stride", "add_bos_token"}
    assert not settings & config.keys()


class HeardError(BaseException):
    """The tokens that reached an engine."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    recipe = recipe_of("llama", 0, "float32")
    base = tmp_path_factory.mktemp("engine")
    return make_engine(recipe, resolve_pair(recipe, base=base, cache=base / "sources"))


def of_run(engine: Engine, text: str, monkeypatch: pytest.MonkeyPatch, work: Path) -> Any:
    monkeypatch.setattr(cli_run, "load", lambda *_: engine)
    monkeypatch.setattr(cli_run, "gate_warning", lambda _: None)
    (work / "artifact").mkdir()
    (work / "artifact" / "manifest.json").touch()
    invoke("run", work / "artifact", "--prompt", text, catch_exceptions=False)


def of_bench(engine: Engine, text: str, monkeypatch: pytest.MonkeyPatch, work: Path) -> Any:
    monkeypatch.setattr(bench, "load", lambda *_, **__: engine)
    monkeypatch.setattr(bench, "load_recipe", lambda _: recipe_of("llama", 0, "float32"))
    monkeypatch.setattr(bench, "recipe_prompts", lambda *_: [Prompt("1", "chat", text)])
    bench.bench(work, work, 1, 4, None)


def of_tune(engine: Engine, text: str, monkeypatch: pytest.MonkeyPatch, work: Path) -> Any:
    monkeypatch.setattr(tune, "_costs", lambda *_: {})
    tune.tune(engine, [Prompt("1", "chat", text)], 1, 4, no_log)


def of_gates(engine: Engine, text: str, monkeypatch: pytest.MonkeyPatch, work: Path) -> Any:
    prompts, recipe = [Prompt("1", "chat", text)], recipe_of("llama", 0, "float32")
    inputs: Any = SimpleNamespace(engine=engine, prompts=prompts, recipe=recipe)
    raise HeardError(encode(inputs)[0])


@pytest.mark.parametrize("command", [of_run, of_bench, of_tune, of_gates])
@pytest.mark.parametrize("name", ["truncation", "padding", "chat_with_bos", "metaspace", "eos_by_config"])
def test_commands_tokenize_alike(
    name: str, command: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd.CASES[name](tmp_path / "source")
    checkpoint = odd.checkpoint_of(tmp_path / "source")
    reference = AutoTokenizer.from_pretrained(tmp_path / "source")

    def heard(prompts: list[list[int]], **_: Any) -> NoReturn:
        raise HeardError(prompts)

    monkeypatch.setattr(engine, "text", Text(odd.packed(checkpoint, tmp_path / "tokenizer")))
    monkeypatch.setattr(engine, "generate", heard)
    text = "a fox, a dog"
    with pytest.raises(HeardError) as caught:
        command(engine, text, monkeypatch, tmp_path)
    new_tokens = recipe_of("llama", 0, "float32").validate_.max_new_tokens if command is of_gates else 4
    longest = longest_prompt(engine.manifest.shapes, new_tokens)
    wanted = tokens_of(reference, text)
    tokens = caught.value.args[0]
    assert tokens == [wanted if command is of_run else wanted[-longest:]]
    prompts = [Prompt("1", "chat", text)]
    assert token_counts(prompts, tokenizer_files(checkpoint)) == [len(wanted)]


def tokens_of(reference: Any, text: str) -> list[int]:
    if not reference.chat_template:
        return list(reference(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    return list(reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@pytest.mark.parametrize("name", ["truncation", "padding", "chat_with_bos", "metaspace", "eos_by_config"])
def test_distill_tokenizes_alike(name: str, tmp_path: Path) -> None:
    odd.CASES[name](tmp_path / "source")
    reference = AutoTokenizer.from_pretrained(tmp_path / "source")
    settings = DistillSettings(recipe_of("llama", 0, "float32"), tmp_path, tmp_path / "out", cache=tmp_path / "cache")
    job = Job(settings, odd.checkpoint_of(tmp_path / "source"), (0,), 16)
    assert job.text.encode_prompt("a fox, a dog") == tokens_of(reference, "a fox, a dog")
    (tmp_path / "given.jsonl").write_text('{"prompt": "a fox, a dog", "answer": "the end"}\n', encoding="utf-8")
    job.held_out_filter = lambda _: True  # type: ignore[assignment]
    transcript = job._transcripts(tmp_path / "given.jsonl")[0]
    assert transcript.prompt == tokens_of(reference, "a fox, a dog")
    assert transcript.answer == reference("the end", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_tokenizer_json_of_its_class_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message used to be `'X' object has no attribute 'backend_tokenizer'`."""
    odd.truncation(tmp_path / "source")

    class SlowTokenizer:
        pass

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: SlowTokenizer())
    with pytest.raises(SourceError, match=r"its class SlowTokenizer has no tokenizer\.json") as caught:
        tokenizer_files(odd.checkpoint_of(tmp_path / "source"))
    assert caught.value.fix == "add a complete tokenizer.json to the folder"


def test_special_tokens_survive_the_file() -> None:
    """With tokenizers before 0.23, `</s>` of a converted sentencepiece model was text in the artifact's tokenizer."""
    vocab = {piece: number for number, piece in enumerate(["</s>", "a", "b", "\u2581", "<", "/", "s", ">"])}

    def with_token(*, normalized: bool) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(vocab, []))
        tokenizer.normalizer = normalizers.Prepend("\u2581")
        tokenizer.add_special_tokens([AddedToken("</s>", normalized=normalized)])
        return tokenizer

    in_memory, in_file = with_token(normalized=False), with_token(normalized=True).to_str()
    wanted = in_memory.encode("a</s>b").tokens
    assert "</s>" in wanted
    assert Tokenizer.from_str(in_file).encode("a</s>b").tokens != wanted
    backend = SimpleNamespace(encode=in_memory.encode, to_str=lambda: in_file)
    assert Tokenizer.from_str(serialized(backend)).encode("a</s>b").tokens == wanted
    unchanged = with_token(normalized=True)
    assert json.loads(serialized(unchanged)) == json.loads(in_file)


def test_a_template_of_a_processor_reaches_the_server(tmp_path: Path) -> None:
    """`run` used `chat_template.json`, and the server of the same artifact had no template."""
    odd.truncation(tmp_path / "source")
    config = tmp_path / "source" / "tokenizer_config.json"
    data = json.loads(config.read_text(encoding="utf-8"))
    del data["chat_template"]
    config.write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "source" / "chat_template.json").write_text(json.dumps({"chat_template": odd.CHAT_WITH_BOS}))
    folder = odd.packed(odd.checkpoint_of(tmp_path / "source"), tmp_path / "new")
    assert AutoTokenizer.from_pretrained(folder).chat_template == odd.CHAT_WITH_BOS
    assert Text(folder).chat_text("a") == "<s>[user] a</s>[assistant]"


def test_gguf_files_are_read_without_their_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer_config.json beside the GGUF file changed the tokens, and its `auto_map` named code to run."""
    (tmp_path / "model.gguf").touch()
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["mine.Tokenizer", null]}}')
    seen: list[str] = []

    def from_pretrained(folder: str, **_: Any) -> NoReturn:
        seen.extend(path.name for path in Path(folder).iterdir())
        raise ValueError("enough")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(SourceError, match="enough"):
        _save_tokenizer(tmp_path / "model.gguf", tmp_path)
    assert seen == ["model.gguf"]


def test_every_call_of_transformers_forbids_custom_code() -> None:
    """Without `trust_remote_code=False`, transformers asks on stdin and runs the code after `y`."""
    calls: list[str] = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in nodes(path.read_text(encoding="utf-8")):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            given = {k.arg: k.value for k in node.keywords}.get("trust_remote_code")
            calls.append(node.func.attr)
            assert isinstance(given, ast.Constant), f"{path}:{node.lineno}"
            assert given.value is False, f"{path}:{node.lineno}"
    assert len(calls) >= 5
