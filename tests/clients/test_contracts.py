"""Our files of others' protocols say what theirs say, and both can be loaded into one process."""

from __future__ import annotations

import pytest

from tests.clients.conftest import program
from tests.cluster.harness import ROOT

#: Both sides' modules by what has theirs. Ours may leave messages and fields out, and add none.
CHECK = """
import importlib, sys
from google.protobuf import descriptor_pb2

def described(module):
    file = descriptor_pb2.FileDescriptorProto()
    importlib.import_module(module).DESCRIPTOR.CopyToProto(file)
    return file

def messages(types, prefix):
    for one in types:
        name = f"{prefix}.{one.name}"
        yield name, {(field.number, field.name, field.type, field.label, field.type_name) for field in one.field}
        yield from messages(one.nested_type, name)

def facts(module):
    file = described(module)
    found = dict(messages(file.message_type, file.package))
    for enum in file.enum_type:
        found[f"{file.package}.{enum.name}"] = {(value.number, value.name) for value in enum.value}
    for service in file.service:
        found[f"{file.package}.{service.name}()"] = {
            (one.name, one.input_type, one.output_type, one.client_streaming, one.server_streaming)
            for one in service.method
        }
    return found

theirs = {}
for module in sys.argv[2].split(","):
    theirs |= facts(module)
ours = facts(sys.argv[1])
for name, parts in ours.items():
    assert name in theirs, name
    assert parts <= theirs[name], (name, parts - theirs[name])
for name in theirs:
    if name.endswith("()"):
        assert name not in ours or ours[name] == theirs[name], (name, theirs[name] - ours[name])
print(len(ours))
"""


@pytest.mark.parametrize(
    ("ours", "theirs", "needs"),
    [
        (
            "kserve_pb2",
            "tritonclient.grpc.service_pb2,tritonclient.grpc.model_config_pb2",
            "tritonclient[grpc]",
        ),
        ("vllm_engine_pb2", "smg_grpc_proto.generated.vllm_engine_pb2", "smg-grpc-proto"),
        ("smg_common_pb2", "smg_grpc_proto.generated.common_pb2", "smg-grpc-proto"),
        ("orca_report_pb2", "xds.data.orca.v3.orca_load_report_pb2", "xds-protos"),
        ("orca_service_pb2", "xds.service.orca.v3.orca_pb2", "xds-protos"),
    ],
)
def test_names_and_numbers_are_theirs(ours: str, theirs: str, needs: str) -> None:
    said = program(CHECK, f"protos.compat.{ours}", theirs, needs=(needs,), PYTHONPATH=str(ROOT))
    assert int(said) > 0
