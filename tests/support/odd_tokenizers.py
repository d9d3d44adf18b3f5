"""Folders with tokenizers as people's files have them: state of single calls, settings in two places, older formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from pipeline.models.families import config_of
from pipeline.progress import no_progress
from pipeline.sources.checkpoint import CONFIG_FILES, TOKENIZER_FILES, Checkpoint, content_revision, digest_files
from pipeline.sources.tokenizer import tokenizer_files
from support import families
from support.checkpoints import CONFIG

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "",
    "  two  spaces , and a comma .  ",
    "caf\u00e9 na\u00efve \u2014 \u4f60\u597d \U0001f600 e\u0301",
    "<s>one</s> <tool> two <tool>three<Upper> <|im_start|>user\nhi<|im_end|>",
    "first\u2028second\u0085third\ttab\r\n",
    "don't 12 + 345 ? ! n't 's",
)
CHAT_WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_bos_token %}never{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}

Case = Callable[[Path], None]


def _base(root: Path, form: str = "json-config", model: dict[str, Any] = LLAMA, **config: Any) -> None:
    families.write_tokenizer(root, form)
    (root / "config.json").write_text(json.dumps(model))
    _merge(root / "tokenizer_config.json", config)


def _merge(path: Path, changes: dict[str, Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    data = {key: value for key, value in (data | changes).items() if value is not ...}
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _json(root: Path, **changes: Any) -> None:
    _merge(root / "tokenizer.json", changes)


def _tokenizer(root: Path) -> Tokenizer:
    return Tokenizer.from_file(str(root / "tokenizer.json"))


def truncation(root: Path) -> None:
    _base(root)
    _json(root, truncation={"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0})


def truncation_of_the_left(root: Path) -> None:
    _base(root, truncation_side="left")
    _json(root, truncation={"direction": "Left", "max_length": 3, "strategy": "OnlyFirst", "stride": 1})


def padding(root: Path) -> None:
    _base(root)
    fixed = {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": 8}
    _json(root, padding=fixed | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"})


def padding_with_a_new_token(root: Path) -> None:
    _base(root)
    longest = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 16}
    _json(root, padding=longest | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<new-pad>"})


def both_of_class_llama(root: Path) -> None:
    padding(root)
    truncation_side = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    _json(root, truncation=truncation_side)
    _merge(root / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "model_max_length": 4})


def no_bos_by_config(root: Path) -> None:
    _base(root, add_bos_token=False)


def eos_by_config(root: Path) -> None:
    _base(root, add_eos_token=True, add_bos_token=True)


def bos_of_llama_class(root: Path) -> None:
    _base(root, tokenizer_class="LlamaTokenizerFast", add_bos_token=True, add_eos_token=True)


def eos_by_post_processor(root: Path) -> None:
    _base(root)
    tokenizer = _tokenizer(root)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(root / "tokenizer.json"))


def no_post_processor(root: Path) -> None:
    _base(root, add_bos_token=...)
    _json(root, post_processor=None)


def added_tokens(root: Path) -> None:
    _base(root)
    tokenizer = _tokenizer(root)
    tokenizer.add_tokens([
        AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("<Upper>", normalized=True, single_word=True),
        AddedToken("quick", special=True),
    ])  # fmt: skip
    tokenizer.save(str(root / "tokenizer.json"))


def added_tokens_of_config(root: Path) -> None:
    flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    table = {
        "1": {"content": "<s>", **flags, "lstrip": False},
        "340": {"content": "<tool>", **flags},
        "341": {"content": "<Upper>", **flags, "special": False, "normalized": True},
    }
    _base(root, added_tokens_decoder=table, additional_special_tokens=["<tool>"])


def added_tokens_file(root: Path) -> None:
    _base(root, form="vocab-merges", model=QWEN2)
    (root / "added_tokens.json").write_text(json.dumps({"<tool>": 340, "<|im_start|>": 341}))


def special_tokens_map(root: Path) -> None:
    """The older file contradicts the config."""
    _base(root, bos_token=..., chat_template=CHAT_WITH_BOS)
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    special = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", **flags}, "pad_token": "<new-pad>"}
    (root / "special_tokens_map.json").write_text(json.dumps(special | {"additional_special_tokens": ["<tool>"]}))


def byte_level_with_prefix(root: Path) -> None:
    _base(root)
    tokenizer = _tokenizer(root)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(root / "tokenizer.json"))


def prefix_by_config(root: Path) -> None:
    _base(root, add_prefix_space=True)


def prefix_by_config_of_qwen2(root: Path) -> None:
    _base(root, model=QWEN2, tokenizer_class="Qwen2Tokenizer", add_prefix_space=True)


def metaspace(root: Path) -> None:
    """As converters write Llama's: prepended spaces by a normalizer, byte fallback, a decoder that strips one space."""
    _base(root)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = dict.fromkeys([*pieces, "\u2581", *(chr(code) for code in range(33, 127))])
    merges = [("\u2581", "a"), ("t", "h"), ("\u2581", "th"), ("\u2581th", "e")]
    vocab |= dict.fromkeys("".join(merge) for merge in merges)
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(vocab)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(root / "tokenizer.json"))


def metaspace_of_llama_class(root: Path) -> None:
    metaspace(root)
    _merge(root / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})


def sentencepiece(root: Path) -> None:
    _base(root, form="sentencepiece", chat_template=CHAT_WITH_BOS)


def sentencepiece_with_eos(root: Path) -> None:
    _base(root, form="sentencepiece", add_bos_token=False, add_eos_token=True, legacy=False)


def vocab_and_merges(root: Path) -> None:
    _base(root, form="vocab-merges", model=QWEN2)


def no_tokenizer_config(root: Path) -> None:
    _base(root)
    (root / "tokenizer_config.json").unlink()


def chat_with_bos(root: Path) -> None:
    _base(root, chat_template=CHAT_WITH_BOS, add_bos_token=True)


def chat_in_a_file(root: Path) -> None:
    _base(root, chat_template="never")
    (root / "chat_template.jinja").write_text(CHAT_WITH_BOS + "\u4f60\u597d", encoding="utf-8")


def bos_of_the_class(root: Path) -> None:
    """No file names begin and end of sequence: defaults of the class, which the template uses."""
    tokens = {"bos_token": ..., "eos_token": ..., "unk_token": ...}
    _base(root, tokenizer_class="LlamaTokenizer", chat_template=CHAT_WITH_BOS, **tokens)


def split_special_tokens(root: Path) -> None:
    _base(root, split_special_tokens=True)


def clean_up_spaces(root: Path) -> None:
    _base(root, clean_up_tokenization_spaces=True)


def short_model_max_length(root: Path) -> None:
    _base(root, model_max_length=5, chat_template=CHAT_WITH_BOS)


def lower_case_and_accents(root: Path) -> None:
    _base(root)
    tokenizer = _tokenizer(root)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.save(str(root / "tokenizer.json"))


def words_without_ascii(root: Path) -> None:
    """Special tokens and a template outside ASCII."""
    begin = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    _base(
        root, bos_token=begin, chat_template="{{ bos_token }}\u7528\u6237: {{ messages[0]['content'] }}\n\u52a9\u624b:"
    )


def stray_files(root: Path) -> None:
    """Files that do not belong to the checkpoint."""
    _base(root)
    (root / "processor_config.json").write_text("{}")
    (root / "tekken.json").write_text("{}")
    shutil.copy(root / "tokenizer.json", root / "tokenizer.backup.json")


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        truncation, truncation_of_the_left, padding, padding_with_a_new_token, both_of_class_llama, no_bos_by_config,
        eos_by_config, bos_of_llama_class, eos_by_post_processor, no_post_processor, added_tokens,
        added_tokens_of_config, added_tokens_file, special_tokens_map, byte_level_with_prefix, prefix_by_config,
        prefix_by_config_of_qwen2, metaspace, metaspace_of_llama_class, sentencepiece, sentencepiece_with_eos,
        vocab_and_merges, no_tokenizer_config, chat_with_bos, chat_in_a_file, bos_of_the_class, split_special_tokens,
        clean_up_spaces, short_model_max_length, lower_case_and_accents, words_without_ascii, stray_files,
    )
}  # fmt: skip


def checkpoint_of(root: Path) -> Checkpoint:
    """The folder as a checkpoint, without weights."""
    data = json.loads((root / "config.json").read_text(encoding="utf-8"))
    names = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (root / name).is_file()]
    files = digest_files(root, names, None, no_progress)
    return Checkpoint(root, config_of(CONFIG, "test"), data, files, content_revision(files))


def packed(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder `tokenizer` of an artifact."""
    folder.mkdir(parents=True)
    for name, data in tokenizer_files(checkpoint).items():
        (folder / name).write_bytes(data)
    shutil.copy(checkpoint.root / "config.json", folder)
    return folder


def packed_as_before(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder `tokenizer` of an artifact of older versions: a tokenizer.json with state, other files as they are."""
    folder.mkdir(parents=True)
    for name in checkpoint.tokenizer_files:
        shutil.copy(checkpoint.root / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.root, trust_remote_code=False)
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    shutil.copy(checkpoint.root / "config.json", folder)
    return folder
