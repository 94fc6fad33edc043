"""What a checkpoint needs and how fast it can be, by counting bytes; nothing is loaded, no torch, no vLLM."""
