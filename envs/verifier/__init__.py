"""Verdicts on completions: extract one candidate, compare it with the gold answer, never raise, never hang."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.verifier.verdicts import Verifier, check_gold, settle_in_process, verify

__all__ = ["Verifier", "check_gold", "settle_in_process", "verify"]


def __getattr__(name: str) -> Any:
    """What this package exports, imported when it is first asked for: templates need the extraction alone, and
    registering environments nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from envs.verifier import verdicts

    return getattr(verdicts, name)
