"""Load over KServe's protocol, with Triton's client and Locust: `pip install locust tritonclient[grpc]`, then

    locust -f examples/locustfile_kserve.py --host 127.0.0.1:50051 --headless -u 8 -t 30s

Locust's table has the time to the first token, the time between tokens and the whole answer, in milliseconds.
"""

import random
import time
from queue import Queue

import grpc.experimental.gevent as grpc_gevent
from locust import User, task

grpc_gevent.init_gevent()

import numpy as np  # noqa: E402
import tritonclient.grpc as triton  # noqa: E402


def tensor(name: str, values: list[int]) -> triton.InferInput:
    made = triton.InferInput(name, [len(values)], "INT32")
    made.set_data_from_numpy(np.array(values, dtype=np.int32))
    return made


class Client(User):
    def on_start(self) -> None:
        self.server = triton.InferenceServerClient(self.host)
        self.model = self.server.get_model_repository_index().models[0].name
        self.answers: Queue = Queue()
        self.server.start_stream(callback=lambda result, error: self.answers.put((result, error)))

    def on_stop(self) -> None:
        self.server.stop_stream(cancel_requests=True)
        self.server.close()

    @task
    def generate(self) -> None:
        prompt = tensor("input_ids", random.choices(range(5, 2_000), k=256))
        began = last = time.perf_counter()
        self.server.async_stream_infer(
            self.model,
            [prompt, tensor("max_tokens", [64])],
            parameters={"stream": True, "ignore_eos": True},
            enable_empty_final_response=True,
        )
        told, pieces = "first token", 0
        while True:
            result, failure = self.answers.get(timeout=60)
            now = time.perf_counter()
            if failure or result.get_response().parameters["triton_final_response"].bool_param:
                break
            self.report(told, now - last)
            told, last, pieces = "between tokens", now, pieces + 1
        self.report("answer", time.perf_counter() - began, pieces, failure)

    def report(self, name: str, seconds: float, size: int = 0, failure: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="kserve", name=name, response_time=seconds * 1000, response_length=size, exception=failure
        )
