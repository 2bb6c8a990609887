"""vLLM as a writer: nested models as checkpoints of fewer layers, and the process of an engine that loads them."""
