"""A real gRPC server whose answers a test scripts: what the client makes of them is what is tested."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2

from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc


@dataclass
class Script:
    """What the server does, and what it saw."""

    deltas: list[str] = field(default_factory=lambda: ["one", " two"])
    finish: bool = True
    #: After the deltas, wait until the client goes away.
    hang: bool = False
    #: After the deltas, fail with this.
    break_off: grpc.StatusCode | None = None
    refuse: status_pb2.Status | None = None
    #: How many requests are refused before the others are served.
    refusals: int = 1_000_000
    #: Workers that have joined, by id, with their processes.
    workers: dict[str, int] = field(default_factory=lambda: {"p-0": 7})
    address: str = ""
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    orders: list[object] = field(default_factory=list)
    #: The latest generation is over, for whatever reason.
    ended: threading.Event = field(default_factory=threading.Event)


def refusal(code: grpc.StatusCode, message: str, *details: object) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)  # type: ignore[arg-type]
        status.details.append(packed)
    return status


class _Service(inference_pb2_grpc.InferenceServicer, control_pb2_grpc.ControlServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def Generate(self, request, context) -> Iterator[inference_pb2.GenerateResponse]:  # type: ignore[no-untyped-def]
        self.script.requests.append(request)
        context.add_callback(self.script.ended.set)
        if (status := self.script.refuse) is not None and len(self.script.requests) <= self.script.refusals:
            context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
            context.abort(next(c for c in grpc.StatusCode if c.value[0] == status.code), status.message)
        for text in self.script.deltas:
            delta = inference_pb2.Delta(text=text, token_ids=[len(text)])
            yield inference_pb2.GenerateResponse(request_id="r-1", delta=delta)
        if self.script.break_off is not None:
            context.abort(self.script.break_off, "gone")
        if self.script.hang:
            self.script.ended.wait(30)
        elif self.script.finish:
            finished = inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_STOP, stop_match="END")
            finished.usage.completion_tokens = 2
            finished.timings.ttft_s = 0.25
            finished.route.prefill_worker = "p-0"
            yield inference_pb2.GenerateResponse(request_id="r-1", finished=finished)

    def ListModels(self, request, context) -> inference_pb2.ListModelsResponse:  # type: ignore[no-untyped-def]
        return inference_pb2.ListModelsResponse(
            models=[inference_pb2.Model(name="nano", max_model_len=4096, vocab_size=4096, ready=True)]
        )

    def GetStatus(self, request, context) -> control_pb2.Status:  # type: ignore[no-untyped-def]
        status = control_pb2.Status(router_id="router-1", uptime_s=2.5, outcomes={"finished": 3})
        for name, pid in self.script.workers.items():
            worker = status.workers.add(worker_id=name, role=1, state="ready", model="nano", engine="sim", pid=pid)
            worker.load.kv_blocks_free = 10
            worker.lanes.add(peer="d-0", transport="nixl", gigabytes_per_s=3.5)
        if request.requests:
            status.requests.add(request_id="r-1", state="decoding", decode_worker="d-0")
        return status

    def DrainWorker(self, request, context) -> control_pb2.DrainWorkerResponse:  # type: ignore[no-untyped-def]
        if request.worker_id == "nobody":
            context.abort(grpc.StatusCode.NOT_FOUND, "no worker is called nobody")
        self.script.orders.append(request)
        return control_pb2.DrainWorkerResponse()

    def SetWorkerRole(self, request, context) -> control_pb2.SetWorkerRoleResponse:  # type: ignore[no-untyped-def]
        self.script.orders.append(request)
        return control_pb2.SetWorkerRoleResponse()


@contextmanager
def serving(script: Script, *, interceptors: Sequence[grpc.ServerInterceptor] = ()) -> Iterator[Script]:
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, interceptors=list(interceptors), options=[("grpc.so_reuseport", 0)])
        service = _Service(script)  # type: ignore[abstract]  # what it lacks is UNIMPLEMENTED, as in any server
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
        control_pb2_grpc.add_ControlServicer_to_server(service, server)
        script.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield script
        finally:
            server.stop(None).wait()
