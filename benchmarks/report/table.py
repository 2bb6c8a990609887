"""The tables of a comparison, and the main one on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.comparison.board import clock
from benchmarks.comparison.outcomes import AXES, AXIS_WORDS, ArmLine, NoPair, Pair
from benchmarks.measuring.table import Table, console
from benchmarks.report.comparison import Comparison, Failure, Group
from benchmarks.report.words import interval, number, percent, points, ratio, summary

HEADS = (
    "agent",
    "seeds",
    "accuracy before, %",
    "after, %",
    "gain, points",
    "tokens/s",
    "time",
    "rollout / reward / update, %",
    "KL/token",
    "ESS",
    "skip k/L",
)
NOTES = (
    "Greedy held-out accuracy with 95 % intervals over questions and seeds; tokens/s: of rollouts with their verdicts; "
    "time: of training, without evaluation, and what its parts are of it; KL/token: of the behaviour policy from the "
    "target, in nats; ESS: effective sample size of whole completions under exact reweighting; k/L: layers skipped of "
    "all."
)
WEIGHTS = {
    "mean weight": "weight_mean",
    "share zero": "weight_zero",
    "share below the raw ratio": "weight_shrunk",
    "raw log ratio 1 %": "log_ratio_q01",
    "99 %": "log_ratio_q99",
}


def main_table(group: Group, title: str = "") -> Table:
    """A row for each arm: accuracy, cost, divergence."""
    # A name cut short would not say which agent; numbers may take two lines.
    return Table(HEADS, [_cells(line) for line in group.lines], title=title, note=NOTES, whole=(0,))


def _cells(line: ArmLine) -> list[str]:
    return [
        line.label,
        str(len(line.seeds)),
        interval(line.before),
        interval(line.after),
        points(line.gain, ""),
        f"{line.tokens_per_second:.0f}",
        clock(line.seconds),
        "/".join(f"{100 * line.parts[part] / max(line.seconds, 1e-9):.0f}" for part in ("rollout", "reward", "update")),
        number(line.kl),
        number(line.ess),
        _skip(line),
    ]


def _skip(line: ArmLine) -> str:
    """Layers skipped of all, or their share where runs kept different numbers of layers."""
    kept, share = line.layers_kept, line.skip_ratio
    if not kept or share is None:
        return ""
    if len(kept) > 1:
        return f"{share:.2f}"
    layers = round(kept[0] / (1 - share))
    return f"{layers - kept[0]:.3g}/{layers}"


def pair_table(pairs: Iterable[Pair | NoPair], both_named: bool = False) -> Table:
    """Paired differences, in points, at each kind of budget; ``both_named`` says in each row what from."""
    heads = ["agent", *AXIS_WORDS.values(), "P(better run)"]
    heads += ["rollout speed-up", "wall-clock speed-up", "its time to the other's final accuracy, ratio"]
    rows = []
    for pair in pairs:
        label = f"{pair.label} against {pair.baseline}" if both_named else pair.label
        if isinstance(pair, NoPair):
            rows.append([label, *["no common seed"] * len(AXES), "-", "-", "-", "-"])
            continue
        rows.append(
            [
                label,
                *(points(pair.at_equal(axis).difference, "") for axis in AXES),
                f"{pair.probability_of_improvement:.2f}",
                f"{pair.speed_up_rollout:.2f}x",
                f"{pair.speed_up:.2f}x",
                ratio(pair.time_ratio),
            ]
        )
    return Table(heads, rows)


def sampled_table(group: Group) -> Table:
    """avg@n and pass@k before and after, the interquartile mean, and the time to the target."""
    samples = group.lines[0].samples
    ks = [k for k in group.lines[0].pass_at if k > 1]
    heads = ["agent", f"avg@{samples}", *(f"pass@{k}" for k in ks), "IQM of runs", f"time to {percent(group.target)}"]
    rows = []
    for line in group.lines:
        shares = [(line.sampled_before, line.sampled_after), *(line.pass_at[k] for k in ks)]
        times = ", ".join("never" if seconds is None else clock(seconds) for seconds in line.seconds_to_target)
        rows.append([line.label, *map(_change, shares), percent(line.iqm), times])
    return Table(heads, rows)


def set_table(group: Group) -> Table:
    """Greedy accuracy on the further problem sets; no rows without any."""
    names = list(group.lines[0].sets)
    rows = [[line.label, *(_change(line.sets[name]) for name in names)] for line in group.lines]
    return Table(["agent", *names], rows if names else [])


def _change(share: tuple[float, float]) -> str:
    before, after = share
    return f"{100 * before:.1f} -> {100 * after:.1f}"


def weight_table(group: Group) -> Table:
    """Means over runs and iterations of what the corrections of nested agents did."""
    nested = [arm for arm in group.arms if arm.mean("skip_ratio")]
    rows = [[arm.label, *(number(arm.mean(name)) for name in WEIGHTS.values())] for arm in nested]
    return Table(["agent", *WEIGHTS], rows)


def failure_table(failures: Iterable[Failure]) -> Table:
    """Runs without a usable result."""
    return Table(["agent", "seed", "why", "folder"], [[f.label, str(f.seed), f.error, f.folder] for f in failures])


def print_comparison(comparison: Comparison) -> None:
    """The tables and the summary on standard output."""
    terminal = console()
    for group in comparison.groups:
        terminal.print(main_table(group, title=f"{comparison.grid.title}: {group.name}").rich())
    for sentence in summary(comparison):
        terminal.print(f"- {sentence}", highlight=False, markup=False)
