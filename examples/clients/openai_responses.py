"""openai's responses API, whole and streamed. ``python openai_responses.py URL``"""

import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
asked = {"model": "demo", "input": "Sort: k31 b45 f12", "max_output_tokens": 48, "temperature": 0}

answer = client.responses.create(**asked)
print("whole:", answer.output_text, answer.usage.output_tokens, "tokens")

deltas = [event.delta for event in client.responses.create(**asked, stream=True) if event.type.endswith("text.delta")]
print("streamed:", deltas)
assert "".join(deltas) == answer.output_text
