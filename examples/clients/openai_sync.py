"""openai: several answers, log-probabilities, seeds, streaming with usage. ``python openai_sync.py URL``"""

import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
QUESTION = "Sort: u92 a15 w96 c86 l10 e85 j17 i57"

answer = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": QUESTION}],
    max_tokens=64,
    temperature=0,
    extra_body={"vllm_xargs": {"diffusion_confidence_threshold": 0.95}},
)
print("chat:", answer.choices[0].message.content)

drawn = {"model": "demo", "prompt": "In the beginning", "max_tokens": 16, "temperature": 1.0, "logprobs": 1}
choices = client.completions.create(**drawn, n=3, seed=7).choices
assert [c.text for c in client.completions.create(**drawn, n=3, seed=7).choices] == [c.text for c in choices]
print("three drawn, twice the same:", [c.text for c in choices])
print("log-probability of the first token:", choices[0].logprobs.token_logprobs[0])

stream = client.completions.create(
    model="demo",
    prompt=QUESTION + "\nAnswer:",
    max_tokens=64,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    print("chunk:", chunk.choices[0].text if chunk.choices else chunk.usage)
