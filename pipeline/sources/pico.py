"""A tiny random model, generated on this host: `pico://llama`. For trials of a pipeline in seconds; the text is noise.

`pico://<family>?seed=1&layers=4` varies it; `pico://<family>?draft_vocab=128` is a draft for it that has a reduced
vocabulary and shares its embedding, `&eagle3=1` makes it an untrained EAGLE-3 head. The same location always gives the
same bytes. Later layers are small, so a draft made of the first layer agrees with the whole often, not always.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from filelock import FileLock

from pipeline.errors import SourceError
from pipeline.files.atomic import atomic_dir
from pipeline.models.eagle3 import TAPPED
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD, NORM, TAPS, WeightSpec, weight_specs
from pipeline.progress import Progress, working
from pipeline.sources.base import Fetched
from pipeline.sources.pointers import SINGLE
from pipeline.sources.tensors import layout

if TYPE_CHECKING:
    from numpy import ndarray

GENERATOR = "v1"
"""Part of the cache's key: raise it when the files change."""

VOCAB = 512
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LATER_LAYERS = 0.1
"""Scale of the output of the layers after the first."""

EMBEDDING_SCALE = 0.05
"""Scale of the embedding: small, or a tied model would answer each token with itself."""

LOGITS = 3.0
"""Standard deviation of the logits: neither flat nor certain."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. A model reads tokens and writes the "
    "next one; a draft guesses several tokens ahead and the model checks them all at once. When the guesses are "
    "right, the answer is there sooner; when they are wrong, nothing is lost but a little time. In the morning the "
    "people of the town went to the market to buy bread, milk and apples, and in the evening they went home and "
    "told each other what they had seen there. def add(first, second):\n"
    "    return first + second\n"
    "\n"
    "for number in range(10):\n"
    "    print(number, add(number, 1))\n"
    '{"name": "value", "list": [1, 2, 3], "more": {"nested": true, "other": null}}\n'
    "What is the capital of France? The capital of France is Paris. How many days are in a week? There are seven "
    "days in a week. Write a short story about a cat that wanted to see the sea. Once upon a time there was a cat "
    "that lived in a house on a hill. Every day the cat looked out of the window and thought about the sea. Please "
    "summarise the following text in one sentence. The weather was cold and the wind was strong, but the children "
    "were happy because of the snow.\n"
)


@dataclass(frozen=True)
class Pico:
    """One tiny model. `draft_vocab` makes it the draft of the model that is otherwise the same."""

    family: str
    seed: int = 0
    layers: int = 3
    draft_vocab: int | None = None
    eagle3: int = 0

    @property
    def key(self) -> str:
        """Name of the content."""
        draft = f"-d{self.draft_vocab}" if self.draft_vocab else ""
        draft += "-eagle3-v2" if self.eagle3 else ""
        return f"{self.family}-s{self.seed}-l{self.layers}{draft}-{GENERATOR}"

    def config(self) -> dict[str, Any]:
        """Return `config.json`."""
        config: dict[str, Any] = {"model_type": self.family, **SIZES, **FAMILIES[self.family]}
        config["num_hidden_layers"] = self.layers
        if self.draft_vocab:
            config |= {"num_hidden_layers": 1, "tie_word_embeddings": False, "draft_vocab_size": self.draft_vocab}
        if self.eagle3:
            config |= {"architectures": ["LlamaForCausalLMEagle3"], TAPPED: list(range(TAPS))}
        return config


def fetch(location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
    """Return the folder and revision of `<family>[?seed=..&layers=..&draft_vocab=..]`.

    Raises:
        SourceError: an unknown family or option.

    """
    del base  # of folders only
    pico = _parse(location)
    target = cache / "pico" / pico.key
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with working("writing a tiny model", progress), atomic_dir(target) as work:
                write(pico, work)
    return Fetched(target, pico.key)


def check_location(source: str) -> None:
    """Reject a source `pico://...` with an unknown family or option, without generating anything.

    Raises:
        SourceError: an unknown family or option.

    """
    _parse(source.partition("://")[2])


def moving(location: str) -> bool:
    """Return False: a location always generates the same bytes."""
    del location
    return False


def current_revision(location: str, *, timeout_s: float) -> str | None:
    """Return None: a location always generates the same bytes."""
    del location, timeout_s
    return None


def _parse(location: str) -> Pico:
    where = f"pico://{location}"
    family, _, query = location.partition("?")
    if family not in FAMILIES:
        raise SourceError(f"unknown family: {family!r}", where=where, fix=f"use one of {', '.join(FAMILIES)}")
    limits = {"seed": (0, 2**32 - 1), "layers": (1, 64), "draft_vocab": (1, VOCAB), "eagle3": (0, 1)}
    options: dict[str, int] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        low, high = limits.get(key, (1, 0))
        if not value.isdecimal() or not low <= int(value) <= high:
            accepted = ", ".join(f"{name} ({low}..{high})" for name, (low, high) in limits.items())
            raise SourceError(f"unsupported option: {key}={value!r}", where=where, fix=f"options: {accepted}")
        options[key] = int(value)
    return Pico(family, **options)


def write(pico: Pico, out: Path) -> None:
    """Write the model into the folder `out`; a draft has no tokenizer of its own."""
    config = pico.config()
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if pico.draft_vocab is None:
        _write_tokenizer(out)
    with (out / SINGLE).open("wb") as file:
        for chunk in _weights(pico):
            file.write(chunk)


def _write_tokenizer(out: Path) -> None:
    """Write a byte-level BPE: all bytes, a few hundred merges, three special tokens, a chat template."""
    # Here, because it is slow to import and only this kind of source needs it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    (out / "tokenizer.json").write_text(
        tokenizer.to_str(pretty=True), encoding="utf-8"
    )  # its own `save` hides the operating system's error
    names = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[0]}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **names}
    config |= {"model_max_length": SIZES["max_position_embeddings"], "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _weights(pico: Pico) -> Iterator[bytes]:
    """Yield the safetensors file, piece by piece."""
    whole = Pico(pico.family, pico.seed, pico.layers)
    values = dict(_random(pico, whole))
    shapes = [(name, "I32" if name == D2T else "F32", tensor.shape) for name, tensor in values.items()]
    yield layout(shapes, {"format": "pt"}).header
    for tensor in values.values():
        yield tensor.tobytes()


def _random(pico: Pico, whole: Pico) -> Iterator[tuple[str, ndarray]]:
    """Yield the weights of the whole model, or those that its draft takes from them."""
    import numpy as np  # here, as above

    config = config_of(whole.config(), whole.key)
    # RandomState's stream is frozen by numpy's policy; newer generators may change between releases.
    random = np.random.RandomState(whole.seed)
    drawn = {spec.name: _draw(random, spec, tied=config.tied) for spec in weight_specs(config)}
    if pico.draft_vocab is None:
        yield from drawn.items()
        return
    head = drawn.get(HEAD, drawn[EMBEDDING])
    # Evenly spread, and the end-of-sequence token among them.
    ids = np.unique(np.linspace(SIZES["eos_token_id"], VOCAB - 1, pico.draft_vocab).astype(np.int32))
    offsets = ids - np.arange(len(ids), dtype=np.int32)
    if pico.eagle3:
        head_config = config_of(pico.config(), pico.key)
        own = ("fc.", "model.layers.0.")
        yield from (
            (s.name.replace("model.layers.0.", "midlayer."), _draw(random, s, tied=False).astype(np.float32))
            for s in weight_specs(head_config)
            if s.name.startswith(own)
        )
        yield "norm.weight", drawn[NORM]
    else:
        yield from ((name, w) for name, w in drawn.items() if name.startswith("model.layers.0."))
        yield NORM, drawn[NORM]
    yield HEAD, head[ids]
    yield D2T, offsets.astype(np.int32)


def _draw(random: Any, spec: WeightSpec, *, tied: bool) -> ndarray:
    import numpy as np  # here, as above

    values = random.standard_normal(spec.shape)
    if spec.name.endswith("norm.weight"):
        values = 1 + 0.1 * values
        if spec.name == NORM:
            values = values * (LOGITS * spec.shape[0] ** -0.5 / EMBEDDING_SCALE if tied else LOGITS)
    elif spec.name.endswith(".bias"):
        values = 0.1 * values
    elif spec.name == EMBEDDING:
        values = values * EMBEDDING_SCALE
    else:
        scale = spec.shape[-1] ** -0.5
        adds = spec.name.endswith(("o_proj.weight", "down_proj.weight"))
        later = adds and not spec.name.startswith("model.layers.0.")
        values = values * scale * (LATER_LAYERS if later else 1.0)
    return np.asarray(values, dtype="<f4")
