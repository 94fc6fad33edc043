"""The states of a Mamba layer after the first tokens of a canvas."""
