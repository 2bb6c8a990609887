"""Our verdicts in verl: a custom reward function.

    custom_reward_function.path=pkg://integrations.verl custom_reward_function.name=compute_score

Versions of verl that do not know ``pkg://`` take the path of this file. A template other than ``plain`` is
``+custom_reward_function.reward_kwargs.template=r1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from envs.text import submit


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    template: str = "plain",
    **_: Any,
) -> dict[str, Any]:
    """The verdict on a response, in the fields that verl's own scorers of mathematics have.

    It never hangs: comparisons have a deadline and a memory limit of their own, and may be asked for from any thread.

    Args:
        data_source: where the problem is from; verdicts do not depend on it.
        solution_str: the response.
        ground_truth: ``reward_model.ground_truth``: text, a number, a worked solution or a list of accepted answers.
        extra_info: ``opens_thought`` and ``scorer`` of it are used, if they are there.
        template: where the answer stands.

    Returns:
        ``score`` 1.0 or 0.0, ``acc`` whether it is right, ``pred`` the answer that was read, ``status`` one word of
        ``envs.problem.STATUSES``.

    Raises:
        UsageError: a gold answer that the verifier cannot read, or an unknown template.
    """
    more = extra_info or {}
    future = submit(solution_str, ground_truth, template, more.get("scorer") or "", bool(more.get("opens_thought")))
    verdict = future.result()
    return {
        "score": verdict.reward,
        "acc": verdict.reward >= 1.0,
        "pred": verdict.extracted,
        "status": verdict.status,
    }
