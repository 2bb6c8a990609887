"""The tables of a comparison, and the one of its arms on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from benchmarks.comparison.board import clock
from benchmarks.comparison.differences import NoPair, Pair
from benchmarks.comparison.outcomes import AXIS_WORDS, ArmLine
from benchmarks.experiment.summary import evaluation_rows
from benchmarks.measuring.table import Table, console
from benchmarks.report.charts import cut_off
from benchmarks.report.comparison import Comparison, Failure, Group
from benchmarks.report.words import interval, number, p_value, percent, points, summary, times

NOTES = (
    "Greedy held-out accuracy with 95 % intervals over questions and seeds; tokens/s: of rollouts with their verdicts; "
    "time: of training, without evaluation, and what its parts are of it (what is left of 100: measuring and "
    "book-keeping); KL/token: of the behaviour policy from the target, in nats; ESS: effective sample size of whole "
    "completions under exact reweighting; k/L: layers skipped of all."
)
ARM_COLUMNS: dict[str, Callable[[ArmLine], str]] = {
    "agent": lambda line: line.label,
    "seeds": lambda line: str(len(line.seeds)),
    "accuracy before, %": lambda line: "-" if line.before is None else interval(line.before),
    "after, %": lambda line: interval(line.after),
    "gain, points": lambda line: "-" if line.gain is None else points(line.gain, ""),
    "tokens/s": lambda line: "-" if line.tokens_per_second is None else f"{line.tokens_per_second:.0f}",
    "time": lambda line: "-" if line.seconds is None else clock(line.seconds),
    "rollout / reward / update, %": lambda line: "/".join(
        "-" if line.seconds is None else f"{100 * line.parts[part] / max(line.seconds, 1e-9):.0f}"
        for part in ("rollout", "reward", "update")
    ),
    "KL/token": lambda line: number(line.kl),
    "ESS": lambda line: number(line.ess),
    "skip k/L": lambda line: _skip(line),
}
PAIR_COLUMNS: dict[str, Callable[[Pair], str]] = {
    "P(better run)": lambda pair: f"{pair.probability_of_improvement:.2f}",
    "rollout speed-up": lambda pair: "-" if pair.speed_up_rollout is None else f"{pair.speed_up_rollout:.2f}x",
    "wall-clock speed-up": lambda pair: "-" if pair.speed_up is None else f"{pair.speed_up:.2f}x",
    "time to an accuracy of both, ratio": lambda pair: times(pair.time_ratio, pair.baseline),
}
WEIGHT_COLUMNS = {
    "mean weight": "weight_mean",
    "share zero": "weight_zero",
    "share below the raw ratio": "weight_shrunk",
}
TAIL_COLUMNS = {
    "overlap of completions, 5th percentile": "overlap_q05",
    "of tokens": "overlap_token_q05",
    "log ratio 1 %": "log_ratio_q01",
    "50 %": "log_ratio_q50",
    "99 %": "log_ratio_q99",
}


def arms(group: Group, title: str = "") -> Table:
    """Accuracy, cost and divergence of each arm."""
    return Table.of(group.lines, ARM_COLUMNS, title=title, note=NOTES)


def _skip(line: ArmLine) -> str:
    """Layers skipped of all, or their share where runs kept different numbers of layers."""
    kept, share = line.layers_kept, line.skip_ratio
    if not kept or share is None:
        return ""
    if len(kept) > 1:
        return f"{share:.2f}"
    layers = round(kept[0] / (1 - share))
    return f"{layers - kept[0]:.3g}/{layers}"


def pairs(pairs: Sequence[Pair | NoPair], both_named: bool = False) -> Table:
    """Paired differences, in points, at each kind of budget; ``both_named`` says in each row what from."""
    rows = []
    used = {axis for pair in pairs if isinstance(pair, Pair) for axis in pair.at_equal}
    axes = [axis for axis in AXIS_WORDS if axis in used]
    for pair in pairs:
        if isinstance(pair, NoPair):
            cells = [*["no common seed"] * len(axes), *["-"] * len(PAIR_COLUMNS)]
        else:
            at = pair.at_equal
            cells = [points(at[axis].difference, "") if axis in at else "-" for axis in axes]
            cells += [cell(pair) for cell in PAIR_COLUMNS.values()]
        rows.append([f"{pair.label} against {pair.baseline}" if both_named else pair.label, *cells])
    return Table(["agent", *(AXIS_WORDS[axis] for axis in axes), *PAIR_COLUMNS], rows)


def verdicts(pairs: Sequence[Pair | NoPair], margin: float) -> Table:
    """What may be concluded of each pair at each kind of budget, alone and among all of them."""
    whole = [pair for pair in pairs if isinstance(pair, Pair)]
    many = [f"p among {len(whole)}", f"among {len(whole)}"] if len(whole) > 1 else []
    heads = ["agent", "at", "points", "p", *many[:1], "alone", *many[1:], "p, apart", f"within {100 * margin:g} points"]
    rows = []
    for pair in whole:
        for axis, one in pair.at_equal.items():
            among = [p_value(one.p_holm), one.verdict_holm] if many else []
            rows.append(
                [
                    f"{pair.label} against {pair.baseline}",
                    AXIS_WORDS[axis],
                    points(one.difference, ""),
                    p_value(one.p),
                    *among[:1],
                    one.verdict,
                    *among[1:],
                    p_value(one.p_equivalent),
                    "equivalent" if one.equivalent else "not shown",
                ]
            )
    return Table(heads, rows, left=(0, 1))


def sampled_accuracy(group: Group) -> Table:
    """avg@n and pass@k before and after, the interquartile mean, and the time to the target."""
    samples = min(line.samples for line in group.lines)
    ks = [k for k in group.lines[0].pass_at if 1 < k <= samples]
    to = "time" if group.target is None else f"time to {percent(group.target)}"
    heads = ["agent", *([f"avg@{samples}"] if samples else []), *(f"pass@{k}" for k in ks), "IQM of runs", to]
    rows = []
    for line in group.lines:
        shares = [*([(line.sampled_before, line.sampled_after)] if samples else []), *(line.pass_at[k] for k in ks)]
        reached = ", ".join("never" if seconds is None else clock(seconds) for seconds in line.seconds_to_target)
        rows.append([line.label, *map(_change, shares), percent(line.iqm), reached or "-"])
    return Table(heads, rows)


def further_sets(group: Group) -> Table:
    """Greedy accuracy on the further problem sets; no rows without any."""
    names = list(group.lines[0].sets)
    rows = [[line.label, *(_change(line.sets[name]) for name in names)] for line in group.lines]
    return Table(["agent", *names], rows if names else [])


def _change(share: tuple[float | None, float | None]) -> str:
    before, after = share
    if before is None or after is None:
        return "-"
    return f"{100 * before:.1f} -> {100 * after:.1f}"


def weights(group: Group) -> Table:
    """What the corrections did in each arm that measured it."""
    rows = [[arm.label, *(number(arm.mean(name)) for name in WEIGHT_COLUMNS.values())] for arm in group.weighing_arms]
    return Table(["agent", *WEIGHT_COLUMNS], rows)


def tail(group: Group) -> Table:
    """How far the worst tokens and completions were from the target, in each arm that measured it."""
    measured = [arm for arm in group.arms if arm.mean("overlap_q05") is not None]
    rows = [[arm.label, *(number(arm.mean(name)) for name in TAIL_COLUMNS.values())] for arm in measured]
    return Table(["agent", *TAIL_COLUMNS], rows)


def lengths(group: Group) -> Table:
    """Tokens of held-out completions before and after, and of a rollout's, in each arm that measured them."""
    rows = []
    for arm in group.arms:
        ends = [[evaluation_rows(run.rows)[at]["evaluation"].get("mean_length") for run in arm.runs] for at in (0, -1)]
        if any(value is None for end in ends for value in end):
            continue
        held_out = " -> ".join(f"{fmean(end):.1f}" for end in ends)
        rollout, cut = arm.mean("mean_length"), [share for run in arm.runs for share in cut_off(run)]
        rollouts = ["-", "-"] if rollout is None or not cut else [f"{rollout:.1f}", percent(fmean(cut))]
        rows.append([arm.label, held_out, *rollouts])
    return Table(["agent", "held-out, tokens", "rollouts, tokens", "rollouts cut off"], rows)


def failures(failures: Iterable[Failure]) -> Table:
    """Runs without a usable result."""
    rows = [[failure.label, str(failure.seed), failure.error, failure.folder] for failure in failures]
    return Table(["agent", "seed", "why", "folder"], rows, left=(0, 2, 3))


def print_comparison(comparison: Comparison) -> None:
    """The arms and the summary on standard output."""
    terminal = console()
    for group in comparison.groups:
        terminal.print(arms(group, title=f"{comparison.title}: {group.name}"))
    for sentence in summary(comparison):
        terminal.print(f"- {sentence}", highlight=False, markup=False)
