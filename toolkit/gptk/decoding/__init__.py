"""The decoding run, from settings and prompts to results."""
