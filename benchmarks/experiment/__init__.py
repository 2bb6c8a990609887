"""One run, from a spec to its result. Whatever puts runs side by side belongs to ``comparison``."""

import os

BUDGETS = ("iterations", "tokens", "seconds")
TRACKERS = ("trackio", "wandb")  # agents.monitoring.trackers has a writer of each


def follows() -> bool:
    """Whether another process of this run, under torchrun, is the one that writes and tells."""
    return (os.environ.get("WORLD_SIZE") or "1").strip() != "1" and (os.environ.get("RANK") or "0") != "0"
