"""anthropic's messages API, whole and streamed. ``python anthropic_messages.py URL``"""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none")
asked = {
    "model": "demo",
    "max_tokens": 48,
    "messages": [{"role": "user", "content": "Sort: k31 b45 f12"}],
    "extra_body": {"temperature": 0},
}

answer = client.messages.create(**asked)
print("whole:", answer.content[0].text, answer.usage.output_tokens, "tokens")

with client.messages.stream(**asked) as stream:
    texts = list(stream.text_stream)
print("streamed:", texts)
assert "".join(texts) == answer.content[0].text
