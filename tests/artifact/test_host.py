"""What a host must have for an artifact: each field that differs is named."""

from __future__ import annotations

import pytest

from pipeline.artifact.manifest import read
from pipeline.artifact.verify import check_host
from pipeline.errors import ArtifactError

HOST = {"device": "cpu", "machine": "x86_64", "isa": "avx512"}
TOOLS = {"backend": "stand-in", "torch": "2.13.1", "cxx": "clang"}


def test_check_host_larger_instruction_set(made):
    check_host(read(made).manifest, HOST, toolchain=TOOLS, ranks=1)


@pytest.mark.parametrize(
    ("host", "tools", "ranks", "message"),
    [
        ({"machine": "aarch64"}, {}, 1, "machine: the artifact needs x86_64, this host has aarch64"),
        ({"isa": "default"}, {}, 1, "isa: the artifact needs avx2, this host has default"),
        ({"isa": "sve256"}, {}, 1, "isa: the artifact needs avx2, this host has sve256"),
        ({"device": "trn2"}, {}, 1, "device: the artifact needs cpu, this host has trn2"),
        ({}, {}, 2, "tensor: the artifact needs 1 ranks, found 2"),
        ({}, {"torch": "2.14.0"}, 1, r"toolchain.torch: the artifact needs 2.13.0\+cpu, this host has 2.14.0"),
        ({}, {"backend": "neuron"}, 1, "toolchain.backend: the artifact needs stand-in, this host has neuron"),
    ],
)
def test_check_host_refuses(made, host, tools, ranks, message):
    with pytest.raises(ArtifactError, match=message):
        check_host(read(made).manifest, HOST | host, toolchain=TOOLS | tools, ranks=ranks)


def test_check_host_names_all(made):
    with pytest.raises(ArtifactError) as caught:
        check_host(read(made).manifest, {}, toolchain={}, ranks=4)
    for field in ("device", "machine", "isa", "tensor", "toolchain.backend", "toolchain.torch"):
        assert f"{field}: " in caught.value.what
