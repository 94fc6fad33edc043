"""The two towers on vLLM's layers: public layers and ``ops``; of ``vllm.v1`` only the model state is handed out."""
