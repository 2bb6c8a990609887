"""Trackio and Weights & Biases as writers of stable-baselines3's logger.

    agent.set_logger(Logger("logs", [HumanOutputFormat(sys.stdout), WandbWriter(name="mine", config={"lr": 1e-3})]))

Each belongs to one run of the tracker, which ``close`` ends. Both packages are the extra ``logging``. Where what is
logged goes, and with which credentials, their own environment variables and logins say (``TRACKIO_DIR``,
``TRACKIO_SPACE_ID``, ``WANDB_MODE=offline``, ``wandb login``); nothing of that is stored here.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import FormatUnsupportedError, KVWriter, filter_excluded_keys

from registry import UsageError

PROJECT = "nested-reft"
WRITERS_OF_NUMBERS = ("stdout", "log", "json", "csv", "tensorboard")


@dataclass(frozen=True)
class Completions:
    """A table: ``logger.record("completions", Completions(rows), exclude=WRITERS_OF_NUMBERS)``.

    Attributes:
        rows: of equal columns, such as ``{"question": ..., "completion": ..., "status": ...}``.
    """

    rows: Sequence[Mapping[str, Any]]


class TrackerWriter(KVWriter):
    """What the writers share: which values of a step go to the tracker, and as what.

    Attributes:
        kind: its name in ``exclude`` of ``logger.record``.
        stored: how many steps of this run the tracker had when the writer was made; None where it cannot tell.
    """

    kind: str
    stored: int | None = None

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Log one step.

        Raises:
            FormatUnsupportedError: a value is neither a number, a text nor a table; exclude it for this writer.
        """
        kept = filter_excluded_keys(key_values, key_excluded, self.kind)
        self.log({name: self._value(value) for name, value in kept.items()}, step)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Completions):
            columns = list(value.rows[0]) if value.rows else []
            return self.table(columns, [[self.text(row[column]) for column in columns] for row in value.rows])
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bool | int | float):
            return value
        if hasattr(value, "item") and getattr(value, "size", None) in (1, ()):  # of NumPy
            return value.item()
        if hasattr(value, "numel") and value.numel() == 1:  # of torch
            return value.item()
        raise FormatUnsupportedError([self.kind], type(value).__name__)

    def text(self, value: Any) -> Any:
        """A cell; a lone surrogate, which no tracker can store, as its escape."""
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value

    def log(self, values: dict[str, Any], step: int) -> None:
        """Give one step to the tracker."""
        raise NotImplementedError

    def table(self, columns: list[str], cells: list[list[Any]]) -> Any:
        """The tracker's own kind of table."""
        raise NotImplementedError

    def replace_earlier(self) -> None:
        """Remove logs of earlier processes of this run that nothing can be added to: this one has all their steps."""


class TrackioWriter(TrackerWriter):
    """Steps of a Trackio run; a run of the same name is gone on with.

    Args:
        project: default ``TRACKIO_PROJECT``, else ``nested-reft``.
        name, group, config: of ``trackio.init``.

    Raises:
        UsageError: Trackio is not installed.
    """

    kind = "trackio"

    def __init__(
        self,
        name: str | None = None,
        *,
        project: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.trackio = _package("trackio")
        project = project or os.environ.get("TRACKIO_PROJECT") or PROJECT
        about = {"config": dict(config or {}), "resume": "allow", "embed": False, "auto_log_cpu": False}
        with redirect_stdout(sys.stderr):  # where it tells how to see the run
            self.run = self.trackio.init(project, name, group, **about)
        if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):  # on this machine
            storage = import_module("trackio.sqlite_storage").SQLiteStorage
            self.stored = len(storage.get_logs(self.run.project, self.run.name, run_id=self.run.id))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.run.log(values, step=step)

    def table(self, columns: list[str], cells: list[list[Any]]) -> Any:
        return self.trackio.Table(columns=columns, data=cells)

    def text(self, value: Any) -> Any:
        """A cell. Trackio shows texts as Markdown with HTML in it, so what could be HTML is escaped."""
        value = super().text(value)
        return escape(value, quote=False) if isinstance(value, str) else value

    def close(self) -> None:
        """End the run; what was logged is stored."""
        with redirect_stdout(sys.stderr):
            self.run.finish()


class WandbWriter(TrackerWriter):
    """Steps of a Weights & Biases run, drawn against ``timesteps``; online, a run of the same ``id`` is gone on with.

    Args:
        project: default ``WANDB_PROJECT``, else ``nested-reft``.
        name, group, config, id: of ``wandb.init``.

    Raises:
        UsageError: W&B is not installed, or its run cannot begin.
    """

    kind = "wandb"

    def __init__(
        self,
        name: str | None = None,
        *,
        project: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
        id: str | None = None,
    ) -> None:
        self.wandb = _package("wandb")
        try:
            self.run = self.wandb.init(
                project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
                name=name,
                group=group,
                config=dict(config or {}),
                id=id,
                resume="allow" if id else None,
                reinit="create_new",
                settings=self.wandb.Settings(console="off", silent=True),
            )
        except self.wandb.Error as error:
            said = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise UsageError(f"W&B: {said}; run 'wandb login', or set WANDB_MODE=offline") from None
        # W&B's own steps count the calls, so that each is stored at once, several at one timestep too.
        self.run.define_metric("*", step_metric="timesteps")
        self.stored = int(self.run.step)  # offline 0: each process has a log of its own

    def log(self, values: dict[str, Any], step: int) -> None:
        self.run.log({**values, "timesteps": step})

    def replace_earlier(self) -> None:
        """Remove the offline logs of earlier processes of this run, but for those that have been synced."""
        own = Path(self.run.dir).parent
        for log in own.parent.glob(f"offline-run-*-{self.run.id}"):
            if log.name != own.name and not any(log.glob("*.wandb.synced")):
                shutil.rmtree(log)

    def table(self, columns: list[str], cells: list[list[Any]]) -> Any:
        return self.wandb.Table(columns=columns, data=cells)

    def close(self) -> None:
        """End the run; what was logged is stored."""
        self.run.finish()


KV_WRITERS: dict[str, Any] = {writer.kind: writer for writer in (TrackioWriter, WandbWriter)}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError where a writer's package is not installed."""
    for name in names:
        _package(name)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"logging to {name} needs its package ({error}): pip install 'nested-reft[logging]'") from None
