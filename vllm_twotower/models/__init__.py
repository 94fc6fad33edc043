"""The two towers on vLLM's layers. Uses public vLLM layers and ``ops``; knows nothing of ``vllm.v1``."""
