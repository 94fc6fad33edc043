"""What only a CPU needs: plain kernels for vLLM's runner, portable experts, C++ ops, Triton's interpreter."""
