"""A checkpoint as transformers has it: its shape, its weights, adapters, and the forward that ours is held to."""
