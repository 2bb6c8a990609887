"""Verdicts on completions: extract one candidate, compare it with the gold answer, never raise, never hang."""

from envs.verifier.verdicts import Verifier, check_gold, settle_in_process, verify

__all__ = ["Verifier", "check_gold", "settle_in_process", "verify"]
