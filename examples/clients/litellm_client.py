"""litellm: chat, streamed chat, text completion. ``python litellm_client.py URL``"""

import sys

import litellm

server = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none", "max_tokens": 48, "temperature": 0}
messages = [{"role": "user", "content": "Sort: k31 b45 f12"}]

answer = litellm.completion("hosted_vllm/demo", messages=messages, **server)
print("chat:", answer.choices[0].message.content)

chunks = litellm.completion("hosted_vllm/demo", messages=messages, stream=True, **server)
texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
print("streamed:", [text for text in texts if text])
assert "".join(texts) == answer.choices[0].message.content

mode = {"vllm_xargs": {"diffusion_mode": "self_speculation"}}
text = litellm.text_completion(model="hosted_vllm/demo", prompt="Sort: k31 b45 f12\nAnswer:", extra_body=mode, **server)
print("text, by self-speculation:", text.choices[0].text)
