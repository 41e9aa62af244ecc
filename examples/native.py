"""Tandem's own client: `native.py [ADDRESS]`. Streams an answer, then tells who served it."""

import sys

from tandem import Client

with Client(*sys.argv[1:]) as client:
    generation = client.generate("def fibonacci(n):", max_tokens=32, temperature=0.0)
    for delta in generation:
        print(delta.text, end="", flush=True)
    route = generation.result().finished.route
    print(f"\n-- prefill at {route.prefill_worker}, decode at {route.decode_worker}, KV by {route.transport}")
