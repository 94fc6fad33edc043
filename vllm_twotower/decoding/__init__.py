"""The decoding algorithm in plain torch. Imports neither vLLM nor triton."""
