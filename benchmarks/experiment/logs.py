"""A run's rows in Trackio and W&B as they are written, each once, also where the run was killed and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.monitoring.trackers import KV_WRITERS, Completions
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.summary import scalars
from benchmarks.measuring.durable import read_rows, storage_errors, write_whole

METRICS = "metrics.jsonl"
LOGGED = "logged.json"


class RunLog:
    """Context; ``write`` takes the run's rows as they are written.

    A run that goes on does the rows after its last checkpoint again, with the same numbers: those that a tracker has
    are left out. How many these are it says itself where it can; ``logged.json`` in the run's folder says what is
    stored for certain. To W&B's offline logs nothing can be added: the last process of a run has all rows in one that
    replaces those of earlier processes.
    """

    def __init__(self, spec: RunSpec, folder: Path, names: Sequence[str]) -> None:
        self.spec = spec
        self.folder = folder
        self.names = tuple(dict.fromkeys(names))
        self.writers: dict[str, Any] = {}  # made when there is something new for them
        noted = folder / LOGGED
        self.noted: dict[str, int] = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
        self.had = dict(self.noted)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        for writer in self.writers.values():
            writer.close()
        self._note(self.writers)

    def write(self, row: dict[str, Any], written: int) -> None:
        """Log the last of the ``written`` rows, and what a tracker lacks of those before it."""
        for name in self.names:
            if self.had.get(name, 0) < written:
                self._log(name, row, written)

    def _log(self, name: str, row: dict[str, Any], written: int) -> None:
        is_new = name not in self.writers
        writer = self._open(name) if is_new else self.writers[name]
        rows = read_rows(self.folder / METRICS)[0][self.had.get(name, 0) : written] if is_new else [row]
        for one in rows:
            writer.write(*_values(one), step=one["timesteps"])
        self.had[name] = max(self.had.get(name, 0), written)
        if is_new:
            writer.replace_earlier()
        if writer.stored is None:
            self._note([name])

    def _open(self, name: str) -> Any:
        own = {"id": self.spec.hash} if name == "wandb" else {}
        about = {"group": self.spec.agent["id"], "config": asdict(self.spec)}
        self.writers[name] = writer = KV_WRITERS[name](run_name(self.spec), **about, **own)
        if writer.stored is not None:
            self.had[name] = writer.stored
        return writer

    def _note(self, names: Iterable[str]) -> None:
        new = {name: self.had[name] for name in names}
        if new:
            self.noted |= new
            with storage_errors(self.folder):
                write_whole(self.folder / LOGGED, json.dumps(self.noted) + "\n")


def run_name(spec: RunSpec) -> str:
    """Agent, seed and hash: unlike those of any other run."""
    return f"{spec.agent['id'].replace('/', '-').replace('*', 'x')}-seed{spec.seed}-{spec.hash}"


def _values(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """A row as stable-baselines3's writers take it: scalars, and completions as a table."""
    values: dict[str, Any] = dict(scalars(row))
    shown = row.get("evaluation", {}).get("shown")
    if shown:
        values["completions"] = Completions([{"iteration": row["iteration"], **sample} for sample in shown])
    return values, dict.fromkeys(values, ())
