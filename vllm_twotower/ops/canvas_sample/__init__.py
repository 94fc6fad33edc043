"""From a row of logits to a token and how sure the denoiser is of it."""
