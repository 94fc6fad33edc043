r"""Stream a completion from a running server; text arrives a canvas at a time.

vllm serve vllm_twotower/assets/demo --diffusion --served-model-name demo
python examples/streaming.py http://localhost:8000 $'Sort: u92 a15 w96 c86 l10 e85 j17 i57\nAnswer:'
"""

import sys

from openai import OpenAI

url, prompt = sys.argv[1], sys.argv[2]
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = next(iter(client.models.list())).id
stream = client.completions.create(
    model=model,
    prompt=prompt,
    max_tokens=96,
    temperature=0.0,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"vllm_xargs": {"diffusion_confidence_threshold": 0.8, "diffusion_max_steps": 16}},
)
num_chunks = 0
for chunk in stream:
    if chunk.choices and chunk.choices[0].text:
        num_chunks += 1
        print(f"[{num_chunks}] {chunk.choices[0].text}", flush=True)
    if chunk.usage:
        print(f"{chunk.usage.completion_tokens} tokens in {num_chunks} chunks")
