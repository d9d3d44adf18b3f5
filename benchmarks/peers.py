"""Other engines on the same weights, each in a process of its own, for `decode.py`.

    python benchmarks/peers.py vllm FOLDER [--ngram K | --eagle3 HEAD K [--schedule JSON]]     with vLLM
    python benchmarks/peers.py llama GGUF {BF16,Q8_0,Q4_0}                                     with xllamacpp and gguf

Each needs an environment that has the engine.

Reads lines of JSON, `{"tokens": [...], "limit": 64}`, and answers each with `{"tokens": n, "seconds": s, "steps": m}`:
the tokens after the first, the time that they took, and the steps. With vLLM's speculation an answer also has its
`counters` so far: of steps with drafts, of draft tokens, and of accepted ones by their place in a step. The first
answer, `{"ready": true}`, says that it has loaded.

llama.cpp runs the target's own GGUF with its tensors rewritten at the given precision; beside Q4_0 embeddings are Q8_0,
as llama.cpp's own converter leaves them where a width is no multiple of 256.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Answered:
    """Tokens after the first, their seconds, and steps; of vLLM all ids, and `counters` of all answers so far."""

    tokens: int
    seconds: float
    steps: int
    ids: tuple[int, ...] = ()
    counters: dict[str, Any] | None = None


Answer = Callable[[list[int], int], Answered]
"""Tokens of a prompt and how many to write at most -> what was answered."""
PLACES = "vllm:spec_decode_num_accepted_tokens_per_pos"


def vllm(folder: str, speculation: dict[str, Any] | None, length: int, eager: bool) -> Answer:
    """vLLM's engine in this process, with its defaults for a CPU."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_PLUGINS": ""}
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(
        EngineArgs(model=folder, dtype="bfloat16", max_model_len=length, max_num_seqs=1,
                   enable_prefix_caching=False, speculative_config=speculation, enforce_eager=eager)
    )  # fmt: skip
    count = 0

    def counters() -> dict[str, Any]:
        found = {metric.name: metric for metric in engine.get_metrics()}
        names = {"drafts": "num_drafts", "draft_tokens": "num_draft_tokens"}
        values = {key: found[f"vllm:spec_decode_{name}"].value for key, name in names.items()}
        return values | {"accepted_per_place": list(found[PLACES].values)}

    def answer(tokens: list[int], limit: int) -> Answered:
        nonlocal count
        count += 1
        engine.add_request(str(count), {"prompt_token_ids": tokens}, SamplingParams(temperature=0, max_tokens=limit))
        arrivals: list[tuple[float, tuple[int, ...]]] = []
        while engine.has_unfinished_requests():
            found = engine.step()
            arrivals += [(time.perf_counter(), tuple(output.outputs[0].token_ids)) for output in found]
        (first, already), (last, ids) = arrivals[0], arrivals[-1]
        seen = counters() if speculation else None
        return Answered(len(ids) - len(already), last - first, len(arrivals) - 1, ids, seen)

    return answer


def llama(source: str, precision: str, length: int) -> Answer:
    """llama.cpp's server, called without HTTP."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(rewritten(Path(source), precision))
    params.n_ctx, params.n_parallel, params.n_predict, params.cache_prompt = length, 1, 256, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def answer(tokens: list[int], limit: int) -> Answered:
        asked = {"prompt": tokens, "n_predict": limit, "temperature": 0, "cache_prompt": False, "top_k": 1}
        found = server.handle_completions(asked)
        timings = (found if isinstance(found, dict) else json.loads(found))["timings"]
        new = int(timings["predicted_n"]) - 1
        return Answered(new, float(timings["predicted_ms"]) / 1000, new)

    return answer


def rewritten(source: Path, precision: str) -> Path:
    """The GGUF with its matrices at another precision; vectors stay as they are."""
    import gguf

    reader = gguf.GGUFReader(source)
    kind = gguf.GGMLQuantizationType[precision]
    out = Path(tempfile.mkdtemp()) / f"{precision}.gguf"
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wide = gguf.GGMLQuantizationType.Q8_0 if precision == "Q4_0" and tensor.name in EMBEDDINGS else kind
        wanted = wide if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def main() -> None:
    """Load, then answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["vllm", "llama"])
    parser.add_argument("model")
    parser.add_argument("precision", nargs="?", default="BF16", choices=["BF16", "Q8_0", "Q4_0"])
    parser.add_argument("--ngram", type=int, metavar="K")
    parser.add_argument("--eagle3", nargs=2, metavar=("HEAD", "K"))
    parser.add_argument("--schedule", type=json.loads, metavar="JSON", help="K by number of requests, of `tandem tune`")
    parser.add_argument("--eager", action="store_true", help="compile nothing: slower steps, there sooner")
    parser.add_argument("--length", type=int, default=1024)
    asked = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an engine prints does not belong among the answers
    speculation: dict[str, Any] | None = None
    if asked.ngram:
        speculation = {"method": "ngram", "num_speculative_tokens": asked.ngram, "prompt_lookup_max": 4}
    elif asked.eagle3:
        head, k = asked.eagle3
        speculation = {"method": "eagle3", "model": head, "num_speculative_tokens": int(k)}
        if asked.schedule:
            speculation["num_speculative_tokens_per_batch_size"] = asked.schedule
    answer = (
        vllm(asked.model, speculation, asked.length, asked.eager)
        if asked.engine == "vllm"
        else llama(asked.model, asked.precision, asked.length)
    )
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(asdict(answer(request["tokens"], request["limit"]))), file=out, flush=True)


if __name__ == "__main__":
    main()
