"""What answers amount to: greedy accuracy, avg@k and pass@k with intervals, and outcomes that a comparison takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from benchmarks.answers.kept import GREEDY, SAMPLED, Answer, Answers
from benchmarks.answers.settings import Settings
from benchmarks.measuring.statistics import Interval, mean_interval, pass_at_k
from benchmarks.measuring.table import Table


@dataclass(frozen=True)
class SetResult:
    """One problem set's figures. Intervals are 95 %, for further questions like these; seeds are one, so that they know
    nothing of how much a model changes from training to training.

    Attributes:
        name: of the set, with its split.
        questions: how many.
        greedy: accuracy of one completion a question, at temperature 0.
        avg: avg@k, the share of sampled completions that are right; None where none were sampled.
        pass_at: k -> pass@k, the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, eq. 1).
        samples: sampled completions a question.
        tokens: mean length of a completion, in tokens; None where a server does not tell.
        cut: share of completions that the budget cut off.
        statuses: how often each verdict came up.
    """

    name: str
    questions: int
    greedy: Interval
    avg: Interval | None
    pass_at: dict[int, Interval]
    samples: int
    tokens: float | None
    cut: float
    statuses: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Intervals as objects with value, low and high."""
        plain = asdict(self)
        plain["greedy"] = self.greedy._asdict()
        plain["avg"] = self.avg._asdict() if self.avg else None
        plain["pass_at"] = {str(k): interval._asdict() for k, interval in self.pass_at.items()}
        return plain


def summarise(name: str, answers: Answers, samples: int) -> SetResult:
    """Of a set whose answers are all there."""
    greedy, sampled = answers.of(GREEDY), answers.of(SAMPLED)
    counts = _right(sampled, samples)
    every = [*greedy, *sampled]
    tokens = [answer.tokens for answer in every if answer.tokens is not None]
    return SetResult(
        name=name,
        questions=len(greedy),
        greedy=_over_questions(_right(greedy, 1)),
        avg=_over_questions(counts / samples) if samples else None,
        pass_at={k: _over_questions(pass_at_k(counts, samples, k)) for k in _powers_of_two(samples)},
        samples=samples,
        tokens=float(np.mean(tokens)) if len(tokens) == len(every) else None,
        cut=float(np.mean([answer.finish == "length" for answer in every])),
        statuses=dict(sorted(Counter(answer.status for answer in every).items())),
    )


def outcomes(label: str, name: str, answers: Answers, settings: Settings) -> dict[str, Any]:
    """What ``benchmarks.compare --from`` takes: by the questions' names the share of sampled completions that are
    right, or of greedy ones where none were sampled."""
    samples = settings.samples
    chosen = answers.of(SAMPLED if samples else GREEDY)
    counts = _right(chosen, samples or 1)
    names = [answer.id for answer in chosen[:: samples or 1]]
    shares = (counts / (samples or 1)).tolist()
    by_name: Any = dict(zip(names, shares, strict=True)) if len(set(names)) == len(names) else shares
    result = {"samples": samples, "sampled_right_before": counts.tolist(), "sampled_right_after": counts.tolist()}
    run = {"seed": settings.seed, "evaluations": [{"outcomes": by_name}], "result": result if samples else {}}
    how = f"avg@{samples}" if samples else "greedy"
    return {"task": f"{name}, {how}", "baseline": label, "arms": [{"label": label, "runs": [run]}]}


def table(results: Sequence[SetResult]) -> Table:
    """A row a set."""
    ks = sorted({k for result in results for k in result.pass_at})
    heads = ["set", "questions", "greedy", *(f"avg@{k}" for k in sorted({r.samples for r in results if r.samples}))]
    rows = []
    for result in results:
        row = [result.name, str(result.questions), percent(result.greedy)]
        row += [percent(result.avg)] if result.avg else []
        row += [percent(result.pass_at[k]) for k in ks]
        tokens = "" if result.tokens is None else f"{result.tokens:.0f}"
        rows.append([*row, tokens, f"{result.cut:.0%}", str(result.statuses.get("no_answer", 0))])
    heads += [*(f"pass@{k}" for k in ks), "tokens", "cut off", "no answer"]
    return Table(heads, rows, note="95 % intervals over questions")


def percent(interval: Interval) -> str:
    """Such as ``41.0 % [35.2, 46.8]``; without what is not defined."""
    value = f"{interval.value:.1%}".replace("%", " %")
    return value if np.isnan(interval.low) else f"{value} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _right(answers: Sequence[Answer], samples: int) -> np.ndarray:
    """[Q] right ones of each question."""
    return np.array([answer.right for answer in answers], dtype=int).reshape(-1, max(samples, 1)).sum(1)


def _over_questions(outcomes: ArrayLike) -> Interval:
    """The mean of [Q] outcomes; of one alone without an interval."""
    return mean_interval(outcomes, least=0).within(0, 1)


def _powers_of_two(most: int) -> list[int]:
    """2, 4, 8 ... below ``most``, and ``most``, which is not 1."""
    return sorted({k for k in (2**n for n in range(1, 12)) if k < most} | ({most} if most > 1 else set()))
