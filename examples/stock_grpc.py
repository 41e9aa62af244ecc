"""Nothing but grpcio and code generated from protos/inference.proto: `stock_grpc.py ADDRESS [ADDRESS ...]`.

gRPC itself spreads calls over the routers (IP addresses), leaves out one that is not healthy, and tries again what a
router refuses with UNAVAILABLE or RESOURCE_EXHAUSTED, after the time the router asks for. `API_KEY` is optional.
"""

import json
import os
import sys

import grpc

from protos import inference_pb2, inference_pb2_grpc

SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "tandem.v1.Inference"},
    "methodConfig": [
        {
            "name": [{"service": "tandem.v1.Inference"}],
            "timeout": "60s",
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}

options = [("grpc.service_config", json.dumps(SERVICE_CONFIG))]
metadata = (("authorization", f"Bearer {key}"),) if (key := os.environ.get("API_KEY")) else ()
with grpc.insecure_channel("ipv4:" + ",".join(sys.argv[1:] or ["127.0.0.1:50051"]), options=options) as channel:
    stub = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GenerateRequest(text="def fibonacci(n):", sampling={"max_tokens": 16, "temperature": 0.0})
    for response in stub.Generate(request, metadata=metadata, wait_for_ready=True):
        print(response.delta.text or response.finished, end="", flush=True)
