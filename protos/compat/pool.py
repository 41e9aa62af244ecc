"""A descriptor pool of our own for protocols that others define.

protobuf refuses to load two files that define the same names, and the clients of these protocols load theirs: one
process could not hold a server of ours and a client of theirs. The generated code of this folder takes this module for
`google.protobuf.descriptor_pool`; see protos/build.py.
"""

from google.protobuf import descriptor_pool, duration_pb2

_POOL = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)


def Default() -> descriptor_pool.DescriptorPool:  # the name that generated code calls
    return _POOL
