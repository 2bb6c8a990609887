"""One run, from a spec to its result. Whatever puts runs side by side belongs to ``comparison``."""

import os

BUDGETS = ("iterations", "tokens", "seconds")


def follows() -> bool:
    """Whether another process of this run, under torchrun, is the one that writes and tells."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("RANK", "0") != "0"
