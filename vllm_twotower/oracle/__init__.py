"""The algorithm and both towers in plain torch, on as few screens as possible: what everything is judged by."""
