"""Messages of KServe's protocol, as Triton extends it, <-> values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from protos.compat import kserve_pb2
from router.core.errors import Invalid
from router.core.lifecycle import State
from router.core.stats import Histogram, Stats
from router.edge import tensors
from router.edge.tensors import Element, Tensor
from router.edge.wire import parse
from router.port import ModelView

#: Of every model: what is served is what the workers loaded.
VERSION = "1"
PLATFORM = "tandem"
FINAL = "triton_final_response"

#: Of a text whose length in UTF-8, and four bytes that say it, is one byte on the wire.
_SHORT_BYTES = 123

InferRequest = kserve_pb2.ModelInferRequest

#: Which field of `contents` holds a datatype's elements.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_CONFIG_TYPES = {"BYTES": kserve_pb2.TYPE_STRING} | {
    name: getattr(kserve_pb2, f"TYPE_{name}") for name in ("BOOL", "INT32", "UINT32", "UINT64", "FP32")
}


class Output(NamedTuple):
    name: str
    datatype: str


class TensorFacts(NamedTuple):
    """An input or output, as models' metadata names it."""

    name: str
    datatype: str
    #: -1: any number of elements.
    length: int = 1
    optional: bool = True


# From clients.


def infer_request(data: bytes) -> InferRequest:
    return parse(InferRequest, data)


def named(kind: str, data: bytes) -> tuple[str, str]:
    """A request about a model: its name and version."""
    message = parse(getattr(kserve_pb2, kind), data)
    return message.name, message.version


def only_ready(data: bytes) -> bool:
    return parse(kserve_pb2.RepositoryIndexRequest, data).ready


def inputs(request: InferRequest) -> dict[str, Tensor]:
    """By name. Raises Invalid."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Invalid("raw_input_contents", f"{len(request.inputs)} inputs, but the bytes of {len(raw)}")
    found: dict[str, Tensor] = {}
    for at, said in enumerate(request.inputs):
        if not said.name or said.name in found:
            raise Invalid(f"inputs[{at}].name", f"{said.name!r} is empty or there twice")
        if raw:
            if said.HasField("contents"):
                raise Invalid(said.name, "has contents beside raw_input_contents")
            found[said.name] = tensors.from_raw(said.name, said.datatype, said.shape, raw[at])
        elif said.datatype not in _CONTENTS:
            raise Invalid(said.name, f"datatype {said.datatype!r} is none of {', '.join(_CONTENTS)}")
        else:
            contents = getattr(said.contents, _CONTENTS[said.datatype])
            found[said.name] = tensors.from_elements(said.name, said.shape, contents)
    return found


def parameters(request: InferRequest) -> dict[str, Element | str]:
    found = {}
    for name, parameter in request.parameters.items():
        if choice := parameter.WhichOneof("parameter_choice"):
            found[name] = getattr(parameter, choice)
    return found


# To clients.


class Reply:
    """The responses to one request. The message is built once; each response changes its elements only.

    Elements go the way the request's came: raw, or typed.
    """

    def __init__(self, request: InferRequest, model: str, outputs: Sequence[Output], *, say_final: bool) -> None:
        """`say_final`: each response says whether it is the last."""
        self._outputs = outputs
        self._raw = bool(request.raw_input_contents)
        self._say_final = say_final
        self._message = kserve_pb2.ModelStreamInferResponse(
            infer_response=kserve_pb2.ModelInferResponse(
                model_name=model,
                model_version=VERSION,
                id=request.id,
                outputs=[{"name": name, "datatype": datatype, "shape": [0]} for name, datatype in outputs],
                raw_output_contents=[b""] * len(outputs) if self._raw else (),
            )
        )
        self._response = self._message.infer_response
        #: Elements that each output's shape says.
        self._lengths = [0] * len(outputs)
        if say_final:
            self._response.parameters[FINAL].bool_param = False
        #: What comes before the raw bytes of an only element.
        self._before_raw = b""

    def text(self, text: str) -> bytes:
        """`streamed`, where the one output is a text. Most are short, in an envelope that is the same every time."""
        data = text.encode()
        if not self._raw or len(data) > _SHORT_BYTES:
            return self.streamed(((data,),))
        if not self._before_raw:
            self._before_raw = self._envelope()
        # Field 2, the response, with its last one, 6: the raw bytes, four of which say how many follow.
        size = len(self._before_raw) + len(data) + 6
        raw = b"\x32%c%c\0\0\0%s" % (len(data) + 4, len(data), data)
        return b"".join((b"\x12", _varint(size), self._before_raw, raw))

    def _envelope(self) -> bytes:
        envelope = kserve_pb2.ModelInferResponse()
        envelope.CopyFrom(self._response)
        envelope.outputs[0].shape[:] = [1]
        del envelope.raw_output_contents[:]
        return envelope.SerializeToString()

    def streamed(self, values: Sequence[Sequence[Element]], *, final: bool = False) -> bytes:
        """Values in the order of outputs."""
        self._fill(values, final)
        return self._message.SerializeToString()

    def whole(self, values: Sequence[Sequence[Element]]) -> bytes:
        self._fill(values, True)
        return self._response.SerializeToString()

    def empty_final(self) -> bytes:
        """The last response, without outputs."""
        del self._response.outputs[:]
        del self._response.raw_output_contents[:]
        self._response.parameters[FINAL].bool_param = True
        return self._message.SerializeToString()

    def _fill(self, values: Sequence[Sequence[Element]], final: bool) -> None:
        response = self._response
        for at, ((_, datatype), elements) in enumerate(zip(self._outputs, values, strict=True)):
            if len(elements) != self._lengths[at]:
                self._lengths[at] = len(elements)
                response.outputs[at].shape[:] = [len(elements)]
            if self._raw:
                response.raw_output_contents[at] = tensors.to_raw(datatype, elements)
            else:
                getattr(response.outputs[at].contents, _CONTENTS[datatype])[:] = elements
        if self._say_final and final:
            response.parameters[FINAL].bool_param = True


def _varint(value: int) -> bytes:
    return bytes((value,)) if value < 128 else bytes((value & 127 | 128,)) + _varint(value >> 7)


def failed(request: InferRequest | None, text: str) -> bytes:
    """In-band: the stream goes on."""
    message = kserve_pb2.ModelStreamInferResponse(error_message=text)
    if request is not None:
        message.infer_response.model_name = request.model_name
        message.infer_response.id = request.id
        message.infer_response.parameters[FINAL].bool_param = True
    return message.SerializeToString()


def live(is_live: bool) -> bytes:
    return kserve_pb2.ServerLiveResponse(live=is_live).SerializeToString()


def ready(is_ready: bool) -> bytes:
    """Of the server or of a model: the two messages are alike."""
    return kserve_pb2.ServerReadyResponse(ready=is_ready).SerializeToString()


def server_metadata(version: str) -> bytes:
    extensions = ("model_configuration", "model_repository", "statistics", "parameters")
    return kserve_pb2.ServerMetadataResponse(name="tandem", version=version, extensions=extensions).SerializeToString()


def model_metadata(name: str, takes: Sequence[TensorFacts], gives: Sequence[TensorFacts]) -> bytes:
    kind = kserve_pb2.ModelMetadataResponse.TensorMetadata
    return kserve_pb2.ModelMetadataResponse(
        name=name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[kind(name=one.name, datatype=one.datatype, shape=[one.length]) for one in takes],
        outputs=[kind(name=one.name, datatype=one.datatype, shape=[one.length]) for one in gives],
    ).SerializeToString()


def model_config(name: str, takes: Sequence[TensorFacts], gives: Sequence[TensorFacts]) -> bytes:
    return kserve_pb2.ModelConfigResponse(
        config=kserve_pb2.ModelConfig(
            name=name,
            platform=PLATFORM,
            backend=PLATFORM,
            input=[
                kserve_pb2.ModelInput(
                    name=one.name, data_type=_CONFIG_TYPES[one.datatype], dims=[one.length], optional=one.optional
                )
                for one in takes
            ],
            output=[
                kserve_pb2.ModelOutput(name=one.name, data_type=_CONFIG_TYPES[one.datatype], dims=[one.length])
                for one in gives
            ],
            model_transaction_policy=kserve_pb2.ModelTransactionPolicy(decoupled=True),
        )
    ).SerializeToString()


def model_index(views: Sequence[ModelView]) -> bytes:
    return kserve_pb2.RepositoryIndexResponse(
        models=[
            kserve_pb2.RepositoryIndexResponse.ModelIndex(
                name=view.name,
                version=VERSION,
                state="READY" if view.ready else "UNAVAILABLE",
                reason="" if view.ready else "no worker serves it",
            )
            for view in views
        ]
    ).SerializeToString()


def model_statistics(name: str, stats: Stats) -> bytes:
    finished = stats.outcomes[State.FINISHED]
    ended = sum(stats.outcomes.values())
    computing_s = stats.total_s.sum - stats.queue_wait_s.sum - stats.prefill_s.sum
    return kserve_pb2.ModelStatisticsResponse(
        model_stats=[
            kserve_pb2.ModelStatistics(
                name=name,
                version=VERSION,
                inference_count=finished,
                execution_count=finished,
                inference_stats=kserve_pb2.InferStatistics(
                    success=_duration(stats.total_s),
                    fail=kserve_pb2.StatisticDuration(count=ended - finished),
                    queue=_duration(stats.queue_wait_s),
                    # Clients want the three parts to be counted alike.
                    compute_input=_duration(stats.total_s, stats.prefill_s.sum),
                    compute_infer=_duration(stats.total_s, max(0.0, computing_s)),
                    compute_output=_duration(stats.total_s, 0.0),
                ),
            )
        ]
    ).SerializeToString()


def _duration(counted: Histogram, seconds: float | None = None) -> kserve_pb2.StatisticDuration:
    """`seconds`: where they are not all that was counted."""
    return kserve_pb2.StatisticDuration(
        count=sum(counted.counts), ns=round((counted.sum if seconds is None else seconds) * 1e9)
    )


def no_regions() -> bytes:
    """Of shared memory of either kind: there is none."""
    return kserve_pb2.SystemSharedMemoryStatusResponse().SerializeToString()


def settings(said: Mapping[str, str]) -> bytes:
    """Of logs."""
    message = kserve_pb2.LogSettingsResponse()
    for name, value in said.items():
        message.settings[name].string_param = value
    return message.SerializeToString()
