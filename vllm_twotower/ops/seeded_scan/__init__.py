"""A canvas through a Mamba-2 layer, started from the context tower's state and leaving no state behind."""
