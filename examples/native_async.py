"""Many answers at once over one connection: `native_async.py [ADDRESS]`."""

import asyncio
import sys

from tandem import AsyncClient, TandemError


async def main() -> None:
    async with AsyncClient(*sys.argv[1:]) as client:
        prompts = [f"def f{number}(x):" for number in range(8)]
        answers = (client.generate(prompt, max_tokens=16, timeout_s=30).result() for prompt in prompts)
        for prompt, answer in zip(prompts, await asyncio.gather(*answers, return_exceptions=True), strict=True):
            if isinstance(answer, TandemError):
                print(prompt, "failed:", answer.code, answer.reason, "retry after", answer.retry_after_s)
            elif not isinstance(answer, BaseException):
                print(prompt, repr(answer.text), answer.finished.usage)


asyncio.run(main())
