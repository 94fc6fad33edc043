"""The commit rule of one denoise pass, and the canvases after it."""
