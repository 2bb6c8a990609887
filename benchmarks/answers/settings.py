"""What is evaluated and how, as data: equal settings give the same folder, and an evaluation goes on in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring.durable import json_text, write_whole
from registry import UsageError

FILE = "settings.json"
GENERATED = 256


@dataclass(frozen=True)
class Settings:
    """One model's evaluation.

    Attributes:
        model: ``tiny``, a folder or a hub id; with ``server`` the name that it has there.
        server: the address of an OpenAI-compatible server, up to and with ``/v1``; ``""`` for our engine.
        weights: fingerprint of a local policy's files, None otherwise.
        data: fingerprint of those sets that are files, None where none is one.
        sets: names or files of problem sets, as ``envs.problems.load_problems`` takes them.
        split: of all sets that have it.
        limit: problems of each set, its first ones; 0 for all, of generated ones ``GENERATED``.
        problem_options: options of sets by their names.
        template: how a question becomes a prompt, and where the answer stands.
        max_new_tokens: budget of a completion.
        samples: k, sampled completions a problem; 0 for greedy ones alone.
        temperature: of the sampled ones.
        seed: of everything drawn.
        dtype: of our engine, settled; None for float32 (the built-in model), and for a server.
        body: further fields of a server's requests, such as ``{"top_p": 0.95}``; None leaves a field out.
    """

    model: str
    server: str = ""
    weights: str | None = None
    data: str | None = None
    sets: tuple[str, ...] = ("arithmetic",)
    split: str = "test"
    limit: int = 0
    problem_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    template: str = "plain"
    max_new_tokens: int = 512
    samples: int = 4
    temperature: float = 1.0
    seed: int = 0
    dtype: str | None = None
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """8 hex digits."""
        fields = {name: value for name, value in asdict(self).items() if name != "data" or value is not None}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]

    def options(self, name: str) -> dict[str, Any]:
        """Of the problem set ``name``."""
        limit = self.limit or (GENERATED if name == "arithmetic" else 0)
        return {**({"limit": limit} if limit else {}), **self.problem_options.get(name, {})}

    def claim(self, folder: Path) -> None:
        """Write the settings into ``folder``. Raises ``UsageError`` where it holds the evaluation of others."""
        path, mine = folder / FILE, json.loads(json_text(asdict(self)))
        if not path.is_file():
            write_whole(path, json_text(mine, indent=2) + "\n")
            return
        theirs = _read(path)
        differing = [name for name in mine if theirs.get(name) != mine[name]]
        if differing:
            raise UsageError(
                f"{folder} holds an evaluation with another {differing[0]} ({theirs.get(differing[0])!r}, not "
                f"{mine[differing[0]]!r}): give another --out, or leave it out"
            )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove its folder, or give another --out") from None
