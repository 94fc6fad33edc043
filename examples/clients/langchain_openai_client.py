"""langchain-openai: invoke, stream, batch. ``python langchain_openai_client.py URL``"""

import sys

from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model="demo",
    base_url=f"{sys.argv[1]}/v1",
    api_key="none",
    max_tokens=48,
    temperature=0,
    extra_body={"vllm_xargs": {"diffusion_confidence_threshold": 0.95}},
)

answer = model.invoke("Sort: k31 b45 f12")
print("invoke:", answer.content, answer.usage_metadata["output_tokens"], "tokens")

texts = [chunk.content for chunk in model.stream("Sort: k31 b45 f12")]
print("stream:", [text for text in texts if text])
assert "".join(texts) == answer.content

print("batch:", [answer.content for answer in model.batch(["Sort: k31 b45 f12", "Sort: m8 c3 z99", "Sort: d4 a9 b7"])])
