"""Router and routed experts of a layer, for a CPU; on GPUs vLLM's fused experts run."""
