"""The parameters and results of a graph: what each one is, as plain data, and as the SDK's metaneff on a device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.backends.neuron.module import dotted
from pipeline.errors import CorruptError
from pipeline.files.limits import AGAIN, json_object
from pipeline.graphs.signature import TensorSpec, tensor_of

Kind = Literal["argument", "weight", "state"]
KINDS: Mapping[Kind, str] = {"argument": "USER_INPUT", "weight": "INPUT_WEIGHT", "state": "INPUT_STATE"}
DTYPES = {
    "bool": "BOOL", "int8": "INT8", "int32": "INT32", "int64": "INT64", "float16": "FLOAT16", "bfloat16": "BFLOAT16",
    "float32": "FLOAT",
}  # fmt: skip
"""Dtype -> name in the SDK's `MetaTensor.DataType`."""


@dataclass(frozen=True)
class Place:
    """One parameter: its kind, and its tensor by the name in the signature."""

    kind: Kind
    tensor: TensorSpec


@dataclass(frozen=True)
class Boundary:
    """Parameters in order (arguments first), results in order, and the parameter whose memory each state result has."""

    parameters: tuple[Place, ...]
    results: tuple[TensorSpec, ...]
    aliases: Mapping[int, int]

    def to_json(self) -> bytes:
        """Return equal bytes for equal boundaries."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Boundary:
        """Read the bytes of `to_json`.

        Raises:
            CorruptError: other bytes.

        """
        read = json_object(data, where, "boundary of the graph")
        try:
            parameters = tuple(Place(_kind(one["kind"]), tensor_of(one["tensor"])) for one in read["parameters"])
            results = tuple(map(tensor_of, read["results"]))
            aliases = {int(key): int(value) for key, value in read["aliases"].items()}
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CorruptError("damaged boundary of the graph", where=where, fix=AGAIN) from error
        if not all(0 <= r < len(results) and 0 <= p < len(parameters) for r, p in aliases.items()):
            raise CorruptError("the boundary aliases a tensor that it lacks", where=where, fix=AGAIN)
        return Boundary(parameters, results, aliases)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments that the graph reads, in order."""
        return tuple(place.tensor.name for place in self.parameters if place.kind == "argument")

    @property
    def aliased(self) -> frozenset[str]:
        """Names of the state that the graph writes, in the form of the compiled graph."""
        return frozenset(dotted(self.parameters[index].tensor.name) for index in self.aliases.values())


def metaneff(boundary: Boundary, messages: Any) -> Any:
    """Return the SDK's message for a boundary; `messages` is its module `metaneff_pb2`.

    The runtime binds tensors by position and by the names `input<i>` and `output<i>`, which the compiler gives.
    """
    meta = messages.MetaNeff()
    for index, place in enumerate(boundary.parameters):
        one = _add(meta.input_tensors, f"input{index}", place.tensor, messages)
        one.type = getattr(messages.MetaTensor.Type, KINDS[place.kind])
        if place.kind == "argument":
            one.user_input_key = place.tensor.name.encode()
        else:
            one.checkpoint_key = dotted(place.tensor.name).encode()
    for index, tensor in enumerate(boundary.results):
        _add(meta.output_tensors, f"output{index}", tensor, messages)
    for result, parameter in boundary.aliases.items():
        meta.output_aliases_to[result] = parameter
    return meta


def _add(tensors: Any, name: str, tensor: TensorSpec, messages: Any) -> Any:
    data_type = getattr(messages.MetaTensor.DataType, DTYPES[tensor.dtype])
    return tensors.add(name=name.encode(), shape=list(tensor.shape), data_type=data_type)


def _kind(text: Any) -> Kind:
    for kind in KINDS:
        if kind == text:
            return kind
    raise ValueError(f"not a kind of parameter: {text}")
