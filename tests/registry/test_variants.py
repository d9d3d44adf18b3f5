"""The choice among variants of one release, by facts of the host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, read
from pipeline.errors import InputError


@pytest.mark.parametrize(
    ("host", "chosen"),
    [({"device": "cpu", "machine": "x86_64", "isa": "avx512"}, "cpu-avx512-tp1"),
     ({"device": "cpu", "machine": "x86_64", "isa": "avx2"}, "cpu-avx2-tp1"),
     ({"device": "neuron", "chip": "trn2"}, "trn2-tp8"),
     ({"device": "cpu", "machine": "aarch64", "isa": "default"}, None)],
)  # fmt: skip
def test_choose_a_variant(original, tmp_path, host, chosen):
    from pipeline.registry.release import choose, make_bundle

    artifacts = []
    for number, (requires, ranks) in enumerate([
        ({"device": "cpu", "machine": "x86_64", "isa": "avx2"}, 1),
        ({"device": "cpu", "machine": "x86_64", "isa": "avx512"}, 1),
        ({"device": "neuron", "chip": "trn2"}, 8),
    ]):  # fmt: skip
        root = Path(shutil.copytree(original, tmp_path / str(number)))
        data = json.loads((root / MANIFEST).read_text()) | {"requires": requires}
        data["pair"]["models"]["tp"] = ranks
        (root / MANIFEST).write_text(json.dumps(data))
        artifacts.append(read(root))
    index = make_bundle(artifacts).document
    if chosen is None:
        with pytest.raises(InputError, match="no variant for this host") as caught:
            choose(index, host, None, "here")
        assert "trn2-tp8" in caught.value.fix
    else:
        assert choose(index, host, None, "here") == chosen


def test_choose_never_guesses_ranks(original, tmp_path):
    from pipeline.registry.release import choose, make_bundle

    artifacts = []
    for ranks in (1, 2):
        root = Path(shutil.copytree(original, tmp_path / str(ranks)))
        data = json.loads((root / MANIFEST).read_text())
        data["pair"]["models"]["tp"] = ranks
        (root / MANIFEST).write_text(json.dumps(data))
        artifacts.append(read(root))
    index, host = make_bundle(artifacts).document, {"device": "cpu", "machine": "x86_64", "isa": "avx512"}
    with pytest.raises(InputError, match="2 variants run on this host"):
        choose(index, host, None, "here")
    assert choose(index, host, "cpu-avx2-tp2", "here") == "cpu-avx2-tp2"


def test_host_facts(tmp_path):
    from pipeline.artifact.host import host_facts

    proc, dev, sys_ = tmp_path / "proc", tmp_path / "dev", tmp_path / "sys"
    for folder in (proc, dev, sys_ / "devices/virtual/dmi/id"):
        folder.mkdir(parents=True)
    for flags, isa in (
        ("sse", "default"),
        ("avx2 fma", "avx2"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", "avx512"),
    ):
        (proc / "cpuinfo").write_text(f"processor: 0\nflags\t\t: {flags}\n")
        assert host_facts(proc, dev, sys_)["isa"] == isa
    (dev / "neuron0").touch()
    (sys_ / "devices/virtual/dmi/id/product_name").write_text("trn2.48xlarge\n")
    assert host_facts(proc, dev, sys_) == {"device": "neuron", "chip": "trn2", "lnc": "2"}
