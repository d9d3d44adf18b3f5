"""The messages of a metaneff, by the names and numbers of torch-neuronx 2.9."""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

F = descriptor_pb2.FieldDescriptorProto
_file = descriptor_pb2.FileDescriptorProto(name="fake_metaneff.proto", package="metaneff", syntax="proto3")
_tensor, _neff = _file.message_type.add(name="MetaTensor"), _file.message_type.add(name="MetaNeff")
_kinds = _tensor.enum_type.add(name="Type")
for _number, _name in enumerate(["UNDEFINED_TYPE", "USER_INPUT", "INPUT_STATE", "INPUT_WEIGHT"]):
    _kinds.value.add(name=_name, number=_number)


def _field(message, number, name, kind, repeated=False, type_name=None):
    label = F.LABEL_REPEATED if repeated else F.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, type=kind, label=label)
    if type_name:
        field.type_name = type_name


_field(_tensor, 1, "name", F.TYPE_BYTES)
_field(_tensor, 2, "shape", F.TYPE_INT64, repeated=True)
_field(_tensor, 3, "data_type", F.TYPE_INT32)
_field(_tensor, 6, "checkpoint_key", F.TYPE_BYTES)
_field(_tensor, 7, "type", F.TYPE_ENUM, type_name=".metaneff.MetaTensor.Type")
_field(_tensor, 8, "user_input_key", F.TYPE_BYTES)
_field(_neff, 1, "input_tensors", F.TYPE_MESSAGE, repeated=True, type_name=".metaneff.MetaTensor")
_field(_neff, 2, "output_tensors", F.TYPE_MESSAGE, repeated=True, type_name=".metaneff.MetaTensor")
_field(_neff, 4, "serialized_graph_def", F.TYPE_BYTES)
_field(_neff, 5, "name", F.TYPE_BYTES)
_entry = _neff.nested_type.add(name="OutputAliasesToEntry")
_entry.options.map_entry = True
_field(_entry, 1, "key", F.TYPE_INT64)
_field(_entry, 2, "value", F.TYPE_INT64)
_field(
    _neff, 6, "output_aliases_to", F.TYPE_MESSAGE, repeated=True, type_name=".metaneff.MetaNeff.OutputAliasesToEntry"
)

_pool = descriptor_pool.Default()
_pool.Add(_file)
_Tensor = message_factory.GetMessageClass(_pool.FindMessageTypeByName("metaneff.MetaTensor"))
MetaNeff = message_factory.GetMessageClass(_pool.FindMessageTypeByName("metaneff.MetaNeff"))


class MetaTensor:
    """NxD reads `MetaTensor.Type.INPUT_STATE` and compares with `is`: small integers."""

    class Type:
        USER_INPUT, INPUT_STATE, INPUT_WEIGHT = 1, 2, 3

    class DataType:
        FLOAT, INT32, BOOL, UINT8, INT8, INT64, FLOAT16, BFLOAT16 = 1, 2, 5, 6, 7, 10, 12, 14
