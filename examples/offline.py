from vllm import LLM

from vllm_twotower import diffusion_params, diffusion_stats

if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    small = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    llm = LLM("vllm_twotower/assets/demo", additional_config={"diffusion": True}, **small)
    question = "It is Monday. Move by days: -2 +3 +3 +5 -6 -1 -8"
    params = diffusion_params(max_tokens=96, temperature=0.0, confidence_threshold=0.8)
    output = llm.generate(question + "\nAnswer:", params)
    print(output[0].outputs[0].text)
    print({name: diffusion_stats(llm)[name] for name in ("canvases", "denoise_passes", "commits")})
