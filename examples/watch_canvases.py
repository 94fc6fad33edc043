"""Step an engine by hand and print every canvas before each denoise pass.

TRITON_INTERPRET=1 python examples/watch_canvases.py        # the variable on a CPU only

The workers record passes once asked to (``diffusion_trace_start``) and hand them over after a step
(``diffusion_trace_take``): what was decided, and for every masked position the proposal, its confidence and runners-up.
"""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # step the engine in this process

from vllm import LLM

from vllm_twotower import diffusion_params
from vllm_twotower.config import read_mask_token_id

llm = LLM(
    "vllm_twotower/assets/demo",
    additional_config={"diffusion": True},
    dtype="float32",
    max_model_len=512,
    enforce_eager=True,
    kv_cache_memory_bytes=64 << 20,
)
tokenizer, engine = llm.get_tokenizer(), llm.llm_engine
mask = read_mask_token_id(engine.model_config.hf_config)
llm.collective_rpc("diffusion_trace_start")
question = "Kai has 58 of book, then drops 26, finds 5, gets 20, drops 26. How many now?\nAnswer:"
engine.add_request("0", question, diffusion_params(max_tokens=16, temperature=0.0, max_steps=6))
while engine.has_unfinished_requests():
    outputs = engine.step()
    for passes in llm.collective_rpc("diffusion_trace_take")[0].values():
        for denoise_pass in passes:
            canvas = [t if t != mask else None for t in denoise_pass["tokens"]]
            text = "".join("_" if t is None else tokenizer.decode([t]) for t in canvas)
            position, surest = max(denoise_pass["proposals"].items(), key=lambda item: item[1]["confidence"])
            word = tokenizer.decode([surest["token"]])
            print(f"{text}   surest: {word!r} at {position}, {surest['confidence']:.2f}")
    for output in outputs:
        print("emitted:", output.outputs[0].text)
