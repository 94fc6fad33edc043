"""The gated norm that ends a Mamba layer."""
