"""openai, asynchronously: many requests at once. ``python openai_async.py URL``"""

import asyncio
import sys

import openai

WORDS = ["k31 b45 f12", "m8 c3 z99", "d4 a9 b7", "x1 y2 w3"]


async def main() -> None:
    async with openai.AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none") as client:
        requests = [
            client.completions.create(model="demo", prompt=f"Sort: {w}\nAnswer:", max_tokens=48, temperature=0)
            for w in WORDS
        ]
        for words, answer in zip(WORDS, await asyncio.gather(*requests), strict=True):
            print(words, "->", answer.choices[0].text)


asyncio.run(main())
