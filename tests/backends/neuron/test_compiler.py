"""neuronx-cc as a process, its errors, NEFF headers, and the canonical text of HLO; the compiler is the fake one."""

import os
import time
from types import SimpleNamespace

import pytest

from pipeline.backends.neuron import compiler, hlo
from pipeline.errors import ArtifactError, HostError
from support.neuron_lane import FAKE, messages

FLAGS = compiler.arguments("trn2", 2, {}, "step")


@pytest.fixture
def where(tmp_path, monkeypatch):
    """The compiler's environment; failures are kept below tmp_path."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "RETRY_DELAY_S", 0.0)
    return {**os.environ, "PATH": f"{FAKE / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_arguments_of_a_step_and_of_a_context_graph_are_those_of_nxd_inference():
    """Every phase was compiled with -O1 alone: as functions, whose calls a step pays for."""
    same = ["--auto-cast=none", "--framework=XLA"]
    end = ["--lnc=2", "--model-type=transformer"]
    tensorizer = (
        "--tensorizer-options=--enable-ccop-compute-overlap --cc-pipeline-tiling-factor={} --vectorize-strided-dma"
    )
    assert [
        *same, "--internal-hlo2tensorizer-options=--verify-hlo=true", *end, "--optlevel=2", "--target=trn2",
        tensorizer.format(1),
    ] == FLAGS  # fmt: skip
    assert compiler.arguments("trn2", 2, {}, "context", 8192) == [
        *same, "--internal-hlo2tensorizer-options=--modular-flow-mac-threshold=10 --verify-hlo=true", *end,
        "--optlevel=1", "--target=trn2", tensorizer.format(2),
    ]  # fmt: skip


def test_a_context_of_128k_on_two_cores_has_no_vectorised_dma():
    flags = {lnc: " ".join(compiler.arguments("trn2", lnc, {}, "context", 128 << 10)) for lnc in (1, 2)}
    assert "vectorize-strided-dma" in flags[1]
    assert "vectorize-strided-dma" not in flags[2]


def test_arguments_take_a_recipe_s_flags_and_saturate_infinity_on_trn1():
    flags = compiler.arguments("trn1", 1, {"--optlevel": "3", "enable-fast-loading-neuron-binaries": ""}, "step")
    assert "--optlevel=3" in flags
    assert "--enable-saturate-infinity" in flags
    assert "--enable-fast-loading-neuron-binaries" in flags


def test_compile_neff_gives_a_neff_and_leaves_its_command(where, work):
    data = compiler.compile_neff(b"an hlo", FLAGS, work, where)
    header = compiler.check_neff(data, "here", lnc=2)
    assert header.lnc == 2
    command = (work / "attempt-1/command.txt").read_text()
    assert command.startswith("neuronx-cc compile model.hlo --auto-cast=none")


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        ("NCC_EOOM001", "do not fit the device's memory"),
        ("NCC_EVRF001", "does not support"),
        ("NCC_EXXX999", "see the"),
    ],
)
def test_compile_neff_explains_the_compiler_s_code_and_keeps_the_log(where, work, code, meaning):
    with pytest.raises(HostError) as caught:
        compiler.compile_neff(b"hlo", FLAGS, work, where | {"FAKE_NEURONX_CC": f"fail {code} 70"})
    assert f"neuronx-cc: {code}: " in caught.value.what
    assert meaning in caught.value.what
    kept = compiler.default_root() / "failed-compiles"
    assert str(kept) in caught.value.fix
    files = {path.name for path in next(kept.iterdir()).iterdir()}
    assert files == {"model.hlo", "command.txt", "output.txt"}
    assert not (work / "attempt-2").exists()  # a documented code does not pass the second time


def test_compile_neff_tries_again_after_an_internal_error(where, work):
    data = compiler.compile_neff(b"hlo", FLAGS, work, where | {"FAKE_NEURONX_CC": "once 70"})
    assert compiler.check_neff(data, "here").lnc == 2
    assert (work / "attempt-2").is_dir()


def test_compile_neff_gives_up_after_three_internal_errors(where, work):
    with pytest.raises(HostError, match=r"status 70 \(3 attempts\)"):
        compiler.compile_neff(b"hlo", FLAGS, work, where | {"FAKE_NEURONX_CC": "fail nothing 70"})


def test_compile_neff_does_not_repeat_other_failures(where, work):
    with pytest.raises(HostError, match="ended with status 1:"):
        compiler.compile_neff(b"hlo", FLAGS, work, where | {"FAKE_NEURONX_CC": "fail nothing 1"})
    assert not (work / "attempt-2").exists()


def test_compile_neff_ends_a_compiler_that_hangs(where, work, monkeypatch):
    monkeypatch.setenv("TANDEM_COMPILE_TIMEOUT_S", "1")
    started = time.monotonic()
    with pytest.raises(HostError, match="did not end within 1 s"):
        compiler.compile_neff(b"hlo", FLAGS, work, where | {"FAKE_NEURONX_CC": "sleep"})
    assert time.monotonic() - started < 60


def test_compile_neff_without_a_compiler(work, where, tmp_path):
    with pytest.raises(HostError, match="neuronx-cc is not on PATH"):
        compiler.compile_neff(b"hlo", FLAGS, work, where | {"PATH": str(tmp_path)})


def test_compile_neff_refuses_logical_cores_that_the_chip_lacks(where, work):
    with pytest.raises(HostError, match="NCC_EARG001"):
        compiler.compile_neff(b"hlo", compiler.arguments("trn1", 2, {}, "step"), work, where)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d[:-7], r"truncated or damaged NEFF: \d+ bytes, the header describes 1024 \+ \d+"),
        (lambda d: d[:600], "truncated NEFF: 600 bytes, the header alone has 1024"),
        (lambda d: b"\0" * 2000, "header_size 0, expected 1024"),
    ],
)
def test_check_neff_refuses_what_is_damaged(where, work, damage, says):
    data = compiler.compile_neff(b"hlo" * 100, FLAGS, work, where)
    with pytest.raises(ArtifactError, match=says):
        compiler.check_neff(damage(data), "graph.neff", lnc=2)


def test_check_neff_refuses_other_logical_cores(where, work):
    data = compiler.compile_neff(b"hlo", compiler.arguments("trn2", 1, {}, "step"), work, where)
    with pytest.raises(ArtifactError, match="lnc_size mismatch: expected 2, found 1"):
        compiler.check_neff(data, "graph.neff", lnc=2)


def test_compiler_that_writes_part_of_a_neff_is_noticed(where, work):
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        compiler.compile_neff(b"hlo" * 1000, FLAGS, work, where | {"FAKE_NEURONX_CC": "cut"})


Meta = SimpleNamespace(input_tensors=(), output_tensors=(), output_aliases_to={})
"""A metaneff without inputs."""


def module(*instructions, base=0, prefix=""):
    """An HLO module of one computation; each instruction is (opcode, element type, operands, more)."""
    made = messages()(name=f"{prefix}module", entry_computation_id=base + 1)
    entry = made.computations.add(name=f"{prefix}entry", id=base + 1)
    for number, (opcode, kind, operands, more) in enumerate(instructions, start=1):
        one = entry.instructions.add(name=f"{prefix}{opcode}.{number}", opcode=opcode, id=base + number, **more)
        one.shape.element_type = kind
        one.operand_ids.extend(base + operand for operand in operands)
    entry.root_id = base + len(instructions)
    return made


TWO = (("parameter", 11, (), {}), ("constant", 5, (), {"literal": {"s64s": [3]}}), ("add", 11, (1, 2), {}))


def test_canonical_ignores_names_and_ids():
    assert hlo.canonical(module(*TWO), Meta) == hlo.canonical(module(*TWO, base=70, prefix="x"), Meta)


def test_canonical_tells_constants_operands_and_operators_apart():
    texts = {
        hlo.canonical(module(*TWO), Meta),
        hlo.canonical(module(TWO[0], ("constant", 5, (), {"literal": {"s64s": [4]}}), TWO[2]), Meta),
        hlo.canonical(module(*TWO[:2], ("add", 11, (2, 1), {})), Meta),
        hlo.canonical(module(*TWO[:2], ("multiply", 11, (1, 2), {})), Meta),
    }
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("instruction", "code"),
    [
        (("convert", 12, (1,), {}), "NCC_ESPP004"),
        (("constant", 5, (), {"literal": {"s64s": [1 << 40]}}), "NCC_ESFH002"),
        (("all-reduce", 4, (1,), {}), "NCC_EVRF061"),
        (("dot", 4, (1,), {}), "NCC_EVRF035"),
        (("custom-call", 4, (1,), {"custom_call_target": "AwsNeuronTopK"}), "NCC_EVRF013"),
    ],
)
def test_faults_name_what_the_compiler_does_not_take(instruction, code):
    found = hlo.faults(module(("parameter", 4, (), {}), instruction))
    assert len(found) == 1
    assert code in found[0]


def test_an_operator_that_no_list_has_is_named_and_left_to_the_compiler():
    """A listing that lacks `logistic` or `or`, as the published one does, refused every graph."""
    instructions = [("parameter", 4, (), {}), ("logistic", 11, (1,), {}), ("or", 1, (1,), {}), ("sort", 11, (1,), {})]
    calls = [("custom-call", 11, (1,), {"custom_call_target": name}) for name in ("Mystery", "AwsNeuronArgMin")]
    graph = module(*instructions, *calls)
    assert hlo.unlisted(graph, frozenset(["add"])) == ["Mystery", "sort"]
    assert hlo.unlisted(graph, frozenset(["sort"])) == ["Mystery"]
    assert hlo.faults(graph) == []


def test_custom_calls_are_those_of_the_documents():
    assert len(hlo.CUSTOM_CALLS) == 29


def test_faults_are_none_in_a_plain_graph():
    assert hlo.faults(module(*TWO)) == []


def test_operators_of_the_compiler_s_own_list():
    found = hlo.operators("Add\nSub\nAllgather\nConvertElementType\nReduceWindow\nSort\nLogicalNot\nGetTupleElement\n")
    assert found == {
        "add", "subtract", "all-gather", "convert", "reduce-window", "sort", "not", "get-tuple-element",
    }  # fmt: skip
