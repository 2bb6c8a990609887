"""Decoding: KV slots, prompts at once, one token a step, draws. Nothing here has a gradient."""
