"""Load over the native protocol with Locust: `pip install locust grpcio protobuf googleapis-common-protos`, then

    PYTHONPATH=. locust -f examples/locustfile.py --host 127.0.0.1:50051 --headless -u 8 -t 30s

Locust's table has the time to the first token, the time between tokens and the whole answer, in milliseconds.
"""

import random
import time

import grpc.experimental.gevent as grpc_gevent
from locust import User, task

grpc_gevent.init_gevent()

import grpc  # noqa: E402

from protos import inference_pb2, inference_pb2_grpc  # noqa: E402


class Client(User):
    def on_start(self) -> None:
        self.channel = grpc.insecure_channel(self.host, options=[("grpc.use_local_subchannel_pool", 1)])
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)

    def on_stop(self) -> None:
        self.channel.close()

    @task
    def generate(self) -> None:
        prompt = inference_pb2.TokenIds(ids=random.choices(range(5, 2_000), k=256))
        request = inference_pb2.GenerateRequest(token_ids=prompt, sampling={"max_tokens": 64, "ignore_eos": True})
        began = last = time.perf_counter()
        told, failure, tokens = "first token", None, 0
        try:
            for response in self.inference.Generate(request, timeout=60):
                now = time.perf_counter()
                if response.HasField("delta"):
                    self.report(told, now - last, len(response.delta.text))
                    told, last = "between tokens", now
                else:
                    tokens = response.finished.usage.completion_tokens
        except grpc.RpcError as error:
            failure = error
        self.report("answer", time.perf_counter() - began, tokens, failure)

    def report(self, name: str, seconds: float, size: int, failure: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="grpc", name=name, response_time=seconds * 1000, response_length=size, exception=failure
        )
