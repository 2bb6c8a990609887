"""Outcomes that are there already: run folders, and a JSON file that other trainers' evaluations fit into. Of a run
that is not over they are what it has been evaluated on so far.

The file says what each arm's models answered, by seed and question; every comparison writes one, ``outcomes.json``:

    {"task": "gsm8k test", "baseline": "grpo", "arms": [
        {"label": "grpo", "runs": [
            {"seed": 0, "evaluations": [{"seconds": 0, "outcomes": "0110"},
                                        {"seconds": 61.5, "outcomes": [0, 1, 0.25, 1]}]}]}]}

``outcomes`` are numbers from 0 to 1 in the order of the questions, the same in all runs, or an object of them by the
questions' names; a string of 0 and 1 will do. ``iteration``, ``tokens`` and ``seconds`` (of training, without
evaluation) are what was spent until then, each of which may be left out; with one of them arms are compared at equal
budgets. ``result`` of a run, optional, holds what its result.json would say of cost.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.comparison.arms import group_name
from benchmarks.comparison.outcomes import AXES, ArmOutcome, Outcome
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.summary import evaluation_rows
from benchmarks.experiment.training import RESULT
from registry import UsageError, did_you_mean

REBUILT = ("curve", "right_before", "right_after")  # of a result, what its evaluations say
SECONDS = ("seconds", *(f"seconds_{part}" for part in ("rollout", "reward", "update", "evaluation")), "cpu_seconds")
ACCURACIES = ("accuracy_before", "accuracy_after", "sampled_before", "sampled_after")
KNOWN = {  # of a result: type and what it means -> names
    (str, "a text"): ("agent", "hash", "policy", "env", "silence"),
    ((int, float), "a number"): (
        *SECONDS,
        *ACCURACIES,
        "iterations",
        "tokens",
        "rollout_tokens_per_second",
        "peak_bytes",
    ),
    (int, "a whole number"): ("samples", "unfinished"),
    (list, "a list"): ("sampled_right_before", "sampled_right_after"),
    (dict, "an object"): ("means", "sets_before", "sets_after"),
}
_NUMBER = re.compile(r"((?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
TASK = ("source", "split", "subset", "problems", "problem_options")  # of an evaluation, what chooses its questions


@dataclass(frozen=True)
class Stored:
    """Arms that were measured on the same questions.

    Attributes:
        task: what they are measured on, as a heading.
        arms: in the order in which they were given, those of files first and those of one folder by name.
        baseline: the label of the arm that the others are compared with; None where nothing says which.
        rivals: further pairs of labels that are compared.
    """

    task: str
    arms: tuple[ArmOutcome, ...]
    baseline: str | None = None
    rivals: tuple[tuple[str, str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What ``read`` takes back."""
        return {
            "task": self.task,
            "baseline": self.baseline,
            "rivals": [list(pair) for pair in self.rivals],
            "arms": [{"label": arm.label, "runs": [_run_as_json(run) for run in arm.runs]} for arm in self.arms],
        }

    def of(self, seeds: Sequence[int] | None) -> Stored:
        """With those seeds alone; None: all of them. Raises UsageError where an arm lacks one."""
        wanted = set(seeds) if seeds is not None else {seed for arm in self.arms for seed in arm.seeds}
        for arm in self.arms:
            if missing := sorted(wanted - set(arm.seeds)):
                shared = sorted(set.intersection(*(set(arm.seeds) for arm in self.arms)))
                others = f"or take those that all have, --seeds {','.join(map(str, shared))}," if shared else ""
                raise UsageError(f"arm {arm.label!r} has no run of seed {missing[0]}: add it {others}".rstrip(" ,"))
        return replace(self, arms=tuple(arm.of(sorted(wanted)) for arm in self.arms))


def _run_as_json(run: Outcome) -> dict[str, Any]:
    evaluations = []
    for row, point in zip(evaluation_rows(run.rows), run.result["curve"], strict=True):
        spent = {axis: point[axis] for axis in AXES if axis in point}
        evaluations.append({**spent, "outcomes": row["evaluation"]["right"]})
    result = {name: value for name, value in run.result.items() if name not in REBUILT}
    return {"seed": run.result["seed"], "evaluations": evaluations, "result": result}


def read(paths: Iterable[Path]) -> Stored:
    """The arms of run folders, of folders of these, and of JSON files, all on the same questions.

    Raises:
        UsageError: of one line, which names the file, the field and the remedy.
    """
    arms: dict[str, list[tuple[str, Outcome]]] = {}
    tasks: dict[str, str] = {}
    baseline: str | None = None
    rivals: list[tuple[str, str]] = []
    folders: list[tuple[int, Path]] = []  # with the number of the path that holds each
    order: list[str] = []
    for number, path in enumerate(paths):
        if path.is_dir():
            folders += [(number, folder) for folder in _run_folders(path)]
            continue
        loaded = _load(path, order)
        tasks[str(path)] = loaded.task
        baseline = baseline or loaded.baseline
        rivals += loaded.rivals
        for arm in loaded.arms:
            arms.setdefault(arm.label, []).extend((str(path), run) for run in arm.runs)
    numbered = zip((number for number, _ in folders), _labelled([folder for _, folder in folders]), strict=True)
    for _, (label, folder, task, run) in sorted(numbered, key=lambda one: (one[0], *_by_size(one[1][0]))):
        tasks.setdefault("the run folders", task)
        arms.setdefault(label, []).append((str(folder), run))
    named = {place: task for place, task in tasks.items() if task}
    for place, task in named.items():
        if task != (first := next(iter(named.values()))):
            raise UsageError(f"{place}: the task is {task!r}, before it was {first!r}: compare one task at a time")
    _check(arms)
    outcomes = (
        ArmOutcome(label, tuple(sorted((run for _, run in runs), key=lambda run: run.result["seed"])))
        for label, runs in arms.items()
    )
    return Stored(next(iter(named.values()), "outcomes"), tuple(outcomes), baseline, tuple(rivals))


def _check(arms: Mapping[str, Sequence[tuple[str, Outcome]]]) -> None:
    """One run an arm and seed, and the same questions everywhere."""
    questions: tuple[str, int] | None = None
    for label, runs in arms.items():
        seen: dict[int, str] = {}
        for place, run in runs:
            seed, count = run.result["seed"], run.right().shape[1]
            if seed in seen:
                raise UsageError(f"arm {label!r} has seed {seed} twice, in {seen[seed]} and in {place}: leave one out")
            seen[seed] = place
            if questions is not None and questions[1] != count:
                where = f"{place} (arm {label!r}, seed {seed})"
                raise UsageError(
                    f"{where} has outcomes of {count} questions, {questions[0]} of {questions[1]}: evaluate all on the "
                    "same questions"
                )
            questions = questions or (place, count)


# Run folders


def _run_folders(path: Path) -> list[Path]:
    """A run's folder, or those in it, less the runs that others of them started from."""
    if (path / "spec.json").is_file():
        return [path]
    inside = sorted(spec.parent for spec in path.glob("*/spec.json"))
    started_from = {Path(RunSpec.read(folder / "spec.json").policy).parent.name for folder in inside}
    inside = [folder for folder in inside if folder.name not in started_from]
    if not inside:
        raise UsageError(
            f"{path} is no run folder and holds none (spec.json, {RESULT}): give folders that benchmarks.run or "
            "benchmarks.compare has made"
        )
    return inside


def _labelled(folders: Sequence[Path]) -> list[tuple[str, Path, str, Outcome]]:
    """Label, folder, task and outcome of each run; an arm is what differs in nothing but the seed."""
    if not folders:
        return []
    specs = {folder: RunSpec.read(folder / "spec.json") for folder in folders}
    measured = {folder: _questions(spec) for folder, spec in specs.items()}
    first, *others = folders
    for folder in others:
        for name, value in measured[first].items():
            if measured[folder][name] != value:
                raise UsageError(
                    f"{folder} and {first} are measured on other questions ({name} is {measured[folder][name]!r} and "
                    f"{value!r}): compare one task at a time"
                )
    settings = {folder: _flat(asdict(replace(spec, seed=0))) for folder, spec in specs.items()}
    by_agent: dict[str, list[dict[str, str]]] = {}
    for folder, spec in specs.items():
        by_agent.setdefault(spec.agent["id"], []).append(settings[folder])

    def label(folder: Path) -> str:
        spec = specs[folder]
        own, others = settings[folder], by_agent[spec.agent["id"]]
        differing = [
            name
            for name in sorted({name for one in others for name in one})
            if len({one.get(name) for one in others}) > 1
        ]
        return " ".join([spec.agent["id"], *(f"{name}={own[name]}" for name in differing if name in own)])

    task = group_name(_origin(specs[first].policy), specs[first].env["id"])
    return [(label(folder), folder, task, _so_far(folder)) for folder in folders]


def _so_far(folder: Path) -> Outcome:
    outcome = Outcome.so_far(folder)
    if outcome is None:
        raise UsageError(f"{folder} has not been evaluated yet: let the run go on, or move it elsewhere")
    return outcome


def _origin(policy: str) -> str:
    """The policy of the run whose model ``policy`` is, where that run's folder is still there."""
    model = Path(policy)
    begun = model.parent / "spec.json"
    return _origin(RunSpec.read(begun).policy) if model.name == "model" and begun.is_file() else policy


def _by_size(label: str) -> list[float | str]:
    """Sorts labels, the numbers in them by size: how folders of runs are called says nothing of their order."""
    return [float(part) if n % 2 else part for n, part in enumerate(_NUMBER.split(label))]


def _questions(spec: RunSpec) -> dict[str, Any]:
    """What decides which questions a run is measured on."""
    problems = {name: spec.env.get(name) for name in ("id", "problems", "problem_options")}
    return {**problems, **{f"evaluation.{name}": spec.evaluation.get(name) for name in TASK}}


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested settings by their dotted names."""
    if not isinstance(value, Mapping):
        return {name: str(value)}
    parts = (_flat(part, f"{name}.{key}".removeprefix(".").removeprefix("agent.")) for key, part in value.items())
    return {key: text for part in parts for key, text in part.items()}


# Files of outcomes


def _load(path: Path, order: list[str]) -> Stored:
    """A file's arms; ``order`` is that of the questions' names, if any file has them."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    given = _Field(loaded, str(path))
    given.only("task", "baseline", "rivals", "arms")
    labels = []
    arms = []
    for arm in given.items("arms"):
        arm.only("label", "runs")
        label = arm.take("label", str, "a name")
        if label in labels:
            raise UsageError(f"{arm.place}.label: {label!r} is there twice: put its runs together")
        labels.append(label)
        arms.append(ArmOutcome(label, tuple(_run(run, path, order) for run in arm.items("runs"))))
    baseline = given.take("baseline", str, "an arm's label", None)
    rivals = given.take("rivals", list, "pairs of labels", [])
    for pair in rivals:
        if not isinstance(pair, list) or len({str(name) for name in pair}) != 2 or len(pair) != 2:
            raise UsageError(f"{path}: rivals has {str(pair)[:40]!r}: give pairs of two arms' labels")
    for name in (*([baseline] if baseline else []), *(name for pair in rivals for name in pair)):
        if name not in labels:
            raise UsageError(f"{path}: {name!r} is no arm's label: {did_you_mean(str(name), labels)}")
    return Stored(
        given.take("task", str, "a name", ""), tuple(arms), baseline, tuple((one, other) for one, other in rivals)
    )


@dataclass(frozen=True)
class _Field:
    """A JSON object and where it stands, so that what is wrong in it can be named."""

    value: Any
    place: str

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise UsageError(f"{self.place} must be an object with names, not {str(self.value)[:40]!r}")

    def only(self, *known: str) -> None:
        """Raise UsageError for a name that is not known."""
        for name in self.value:
            if name not in known:
                raise UsageError(f"{self.place}: {name!r} is not known: {did_you_mean(name, known)}")

    def take(self, name: str, type: Any, meant: str, *default: Any) -> Any:
        """A field of that type; raises UsageError where it is another, or missing without a default."""
        if default and self.value.get(name) is None:
            return default[0]
        if name not in self.value:
            raise UsageError(f"{self.place} has no {name!r}: give {meant}")
        value = self.value[name]
        if not isinstance(value, type) or isinstance(value, bool):
            raise UsageError(f"{self.place}.{name} must be {meant}, not {str(value)[:40]!r}")
        return value

    def items(self, name: str) -> list[_Field]:
        """The objects of a list that is not empty."""
        listed = self.take(name, list, "a list of objects")
        if not listed:
            raise UsageError(f"{self.place}.{name} is empty: give one at least")
        return [_Field(one, f"{self.place}: {name}[{n}]") for n, one in enumerate(listed)]


def _run(run: _Field, path: Path, order: list[str]) -> Outcome:
    """A run as if it had been read from its folder."""
    run.only("seed", "evaluations", "result")
    seed = run.take("seed", int, "a whole number")
    curve: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    evaluations = run.items("evaluations")
    axes = [axis for axis in AXES if axis in evaluations[0].value]
    for evaluation in evaluations:
        evaluation.only("outcomes", *AXES)
        right = _outcomes(evaluation, order)
        if rows and len(right) != len(rows[-1]["evaluation"]["right"]):
            raise UsageError(
                f"{evaluation.place}.outcomes has {len(right)} questions, the one before "
                f"{len(rows[-1]['evaluation']['right'])}: give the same questions in each evaluation"
            )
        if axes != [axis for axis in AXES if axis in evaluation.value]:
            said = " and ".join(axes) or "nothing"
            raise UsageError(f"{evaluation.place} must say of what was spent what the run's first does: {said}")
        spent = {axis: _spent(evaluation, axis, curve) for axis in axes}
        curve.append({**spent, "greedy": math.fsum(map(float, right)) / len(right)})
        rows.append({"iteration": spent.get("iteration", len(rows)), "evaluation": {"right": right}})
    result = _result(_Field(run.take("result", dict, "an object", {}), f"{run.place}.result"))
    return Outcome({"hash": path.name, **result, "seed": seed, "curve": curve}, rows, {})


def _result(given: _Field) -> dict[str, Any]:
    """What a run's result.json would say, of the kinds that a report takes."""
    given.only("seed", *REBUILT, *(name for names in KNOWN.values() for name in names))
    for (type, meant), names in KNOWN.items():
        for name in names:
            given.take(name, type, meant, None)
    means = _Field(given.take("means", dict, "an object", {}), f"{given.place}.means")
    for name in means.value:
        means.take(name, (int, float), "a number")
    if samples := given.take("samples", int, "a whole number", 0):
        for name in ("sampled_right_before", "sampled_right_after"):
            right = given.take(name, list, "a list of whole numbers, as there are samples")
            if not right or not all(isinstance(one, int) and 0 <= one <= samples for one in right):
                raise UsageError(f"{given.place}.{name} must hold whole numbers from 0 to {samples}, the samples")
    sets = [given.take(name, dict, "an object", {}) for name in ("sets_before", "sets_after")]
    for name in set(sets[0]):
        for when, one in zip(("before", "after"), sets, strict=True):
            place = f"{given.place}.sets_{when}"
            _Field(_Field(one, place).take(name, dict, "an object"), f"{place}.{name}").take(
                "greedy", (int, float), "a number"
            )
    return {**given.value, "means": means.value}


def _spent(evaluation: _Field, axis: str, curve: Sequence[Mapping[str, Any]]) -> float:
    value = evaluation.take(axis, (int, float), "a number of what was spent until then")
    before = curve[-1][axis] if curve else 0
    if not math.isfinite(value) or value < before:
        raise UsageError(f"{evaluation.place}.{axis} is {value}: it must be a number, and not fall from {before}")
    if curve and value == before and axis in ("iteration", "seconds"):  # stored completions cost no tokens
        raise UsageError(f"{evaluation.place}.{axis} is {value}: it must rise from each evaluation to the next")
    return value


def _outcomes(evaluation: _Field, order: list[str]) -> Sequence[Any]:
    """The outcomes in the questions' order; ``order`` holds the names of the first that has any."""
    value = evaluation.value.get("outcomes")
    place = f"{evaluation.place}.outcomes"
    if isinstance(value, dict):
        order += [] if order else list(value)
        if set(order) != set(value):
            odd = sorted(set(order) ^ set(value))[0]
            raise UsageError(f"{place}: question {odd!r} is not in all evaluations: give the same questions everywhere")
        value = [value[name] for name in order]
    if not isinstance(value, list | str) or not value:
        raise UsageError(f"{place} must be a list of numbers from 0 to 1, one a question, not {str(value)[:40]!r}")
    if isinstance(value, str):
        if set(value) - set("01"):
            raise UsageError(f"{place} is a string: it may hold 0 and 1 alone; give a list of numbers for shares")
        return value
    for n, one in enumerate(value):
        if not isinstance(one, int | float) or not 0 <= one <= 1:
            raise UsageError(f"{place}[{n}] is {one!r}: it must lie from 0 (wrong) to 1 (right)")
    return [float(one) for one in value]
