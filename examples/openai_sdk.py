"""OpenAI's SDK, unchanged (`pip install openai`): `openai_sdk.py [BASE_URL]`."""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=url, api_key=os.environ.get("API_KEY", "none"))
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Write a loop in Python."}],
    max_completion_tokens=32,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "" if chunk.choices else f"\n-- {chunk.usage}", end="", flush=True)
