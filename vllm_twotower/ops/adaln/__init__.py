"""Adaptive layer norm: what the noise level does to a layer's input and output."""
