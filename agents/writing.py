"""Who writes completions: the project's own engine, token by token, or vLLM, a deck of whole completions at a time.

Completions that exist already are played through the environment token by token (``Written``), so that rewards,
wrappers, callbacks and verdicts are what they always are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.nesting import Nesting
from agents.rollout import Acts
from envs.task import Task
from policies import Drafter, Nested, Policy, StoredDrafts
from policies.vllm.checkpoint import check_biases, check_heads, shape_of
from policies.vllm.engine import Engine, Request, check_vllm
from registry import UsageError, writers

SAME_MODEL = 0.1  # nats a token, mean of |log pi - log mu|, that kernels never differ by on one model and layers do
COMPARED = 4  # completions


@dataclass(frozen=True)
class Deck:
    """What is to be written: completions of some problems by one policy.

    Attributes:
        task: which the problems are of.
        slots: how many completions at a time.
        problems: their indices, one a group.
        group_size: G.
        first_group: the number of the first group.
        members: which of a group's G completions, those of one policy: ``range(G)`` but for defensive groups.
        by_target: whether they are the target's part of defensive groups.
        stored: completions that may come again, by episode.
        drafter: what drafts tokens for the nested policy.
    """

    task: Task
    slots: int
    problems: Sequence[int]
    group_size: int
    first_group: int
    members: range
    by_target: bool = False
    stored: StoredDrafts | None = None
    drafter: Drafter | None = None

    def shared(self, target_written: int) -> tuple[Deck, Deck]:
        """The parts of the nested policy and of the target, which writes the first of each group."""
        target, nested = range(target_written), range(target_written, self.group_size)
        return replace(self, members=nested), replace(self, members=target, by_target=True, drafter=None)


class Writing(Protocol):
    """A writer at work for one policy."""

    def behavior(self, nested: Nested, seed: int, deck: Deck) -> Acts:
        """What acts in the episodes of ``deck``, by ``nested`` and the policy's present weights."""
        ...


class Writer(Protocol):
    """Who writes, a component of ``registry.writers``.

    Attributes:
        quantization: how its weights are rounded, ``""`` where mu is the nested policy itself.
    """

    @property
    def quantization(self) -> str: ...

    def check_installed(self, device: torch.device) -> None:
        """Raise ``UsageError`` where what it writes with is not installed."""
        ...

    def check(self, policy: Policy, nesting: Nesting, target_written: int, drafts: bool) -> None:
        """Raise ``UsageError`` for what it cannot write; ``drafts``, whether any are proposed to it."""
        ...

    def open(self, policy: Policy) -> Writing:
        """This writer at work."""
        ...


@writers.register("own")
@dataclass(frozen=True)
class OwnWriter:
    """The project's engine, token by token.

    Use: everywhere; it alone has ``rollout_dtype=int8``, and on a CPU it is the faster one.
    """

    quantization = ""

    def check_installed(self, device: torch.device) -> None:
        """It is."""

    def check(self, policy: Policy, nesting: Nesting, target_written: int, drafts: bool) -> None:
        """It writes whatever a policy computes."""

    def open(self, policy: Policy) -> Writing:
        """As ``Writer.open``."""
        return OwnWriting(policy)


@dataclass(frozen=True)
class OwnWriting:
    """The project's engine at work for a policy."""

    policy: Policy

    def behavior(self, nested: Nested, seed: int, deck: Deck) -> Acts:
        """As ``Writing.behavior``; one KV slot an env slot."""
        return self.policy.behavior(
            nested, deck.slots, deck.task.max_length, seed=seed, stored=deck.stored, drafter=deck.drafter
        )


@writers.register("vllm")
@dataclass(frozen=True)
class VLLMWriter:
    """vLLM: nested policies as models of fewer layers in a process of its own; log mu is what vLLM drew by.

    New weights and other layers go into the engine in place. Its kernels differ from ours, by what ``noise_kl`` and
    ``behavior_noise_kl`` say, so ``sampler=full`` with this writer is the control. A token depends on the seed, its
    episode and, through the order of sums, on what is written beside it: an equal run repeats, one with other slots
    differs in the last bits. The engine is started anew where a draw has more layers than any before.

    Use: on a GPU, or to measure what another engine's numbers do to training. Needs vLLM 0.32 (extra ``vllm``).

    Attributes:
        python: an interpreter whose environment has vLLM, such as ``.venv-vllm/bin/python``; by default this one.
        quantization: how vLLM rounds the weights, a name of its own such as ``fp8``; by default not at all.
    """

    python: str = ""
    quantization: str = ""

    def check_installed(self, device: torch.device) -> None:
        """As ``Writer.check_installed``."""
        check_vllm(self.python, device)

    def check(self, policy: Policy, nesting: Nesting, target_written: int, drafts: bool) -> None:
        """As ``Writer.check``."""
        if policy.sharded:
            raise UsageError("shard=true splits matrices that vLLM takes whole: leave it out, or use writer='own'")
        if drafts:
            raise UsageError(
                "drafts (batch=reuse, a sampler that drafts) are judged by the project's own engine: leave them out, "
                "or use writer='own'"
            )
        if nesting.int8:
            raise UsageError("rollout_dtype=int8 is of the project's own engine: leave it out, or use writer='own'")
        if self.quantization and target_written:
            raise UsageError(
                f"writer.quantization={self.quantization!r} with target_written={target_written}: the target's "
                "completions need log mu of rounded weights, which vLLM alone computes; leave one of them out"
            )
        check_heads(policy)
        if nesting.patcher.patch.tokens:
            check_biases(policy)

    def open(self, policy: Policy) -> Writing:
        """As ``Writer.open``; an engine is started when there is something to write. Raises UsageError without vLLM."""
        self.check_installed(policy.device)
        return VLLMWriting(policy, self)


class VLLMWriting:
    """vLLM at work for a policy: an engine, and with defensive groups another one for the target's part."""

    def __init__(self, policy: Policy, writer: VLLMWriter) -> None:
        self.policy = policy
        self.writer = writer
        self._engines: dict[bool, Engine] = {}  # by whether the target's part is written

    def behavior(self, nested: Nested, seed: int, deck: Deck) -> Acts:
        """As ``Writing.behavior``: all of the deck's completions, written before the first of them is played.

        Raises:
            UsageError: vLLM cannot be started, has ended, or computes another model.
        """
        task, numbers = deck.task, [n * deck.group_size + m for n in range(len(deck.problems)) for m in deck.members]
        prompts = [np.asarray(task.prompt(index)) for index in deck.problems]
        first = deck.first_group * deck.group_size
        request = Request(
            prompts,
            of=[number // deck.group_size for number in numbers],
            seeds=[episode_seed(seed, first + number) for number in numbers],
            temperature=self.policy.temperature,
            max_tokens=task.spec.max_new_tokens,
            stop_token_ids=sorted(task.stop_token_ids),
        )
        tokens, logp = self._engine(nested, deck).write(request) if numbers else ([], [])
        total = len(deck.problems) * deck.group_size
        written = Written(
            first=first,
            prompt_length=np.repeat([len(prompt) for prompt in prompts], deck.group_size),
            length=np.zeros(total, dtype=np.int64),
            tokens=np.zeros((total, task.spec.max_new_tokens), dtype=np.int64),
            logp=np.zeros((total, task.spec.max_new_tokens), dtype=np.float32),
        )
        for number, ids, logps in zip(numbers, tokens, logp, strict=True):
            written.length[number] = len(ids)
            written.tokens[number, : len(ids)], written.logp[number, : len(ids)] = ids, logps
        if numbers and not self.writer.quantization:
            self._require_same_model(nested, prompts, written, numbers[:COMPARED], deck.group_size)
        return written

    def _engine(self, nested: Nested, deck: Deck) -> Engine:
        """An engine that holds ``nested``: the one that writes this part, if its shape does."""
        engine = self._engines.get(deck.by_target)
        wanted = shape_of(self.policy, nested)
        if engine is not None:
            # An engine of all layers was started for all of them; a skipped one saves time in a smaller engine only.
            grown = len(engine.shape.windows) == self.policy.num_layers != len(wanted.windows)
            fits = engine.slots >= deck.slots and engine.longest >= deck.task.max_length
            if fits and not grown and engine.shape.places(wanted) is not None:
                engine.hold(nested)
                return engine
            self._engines.pop(deck.by_target).close()
        writer, longest = self.writer, deck.task.max_length
        engine = Engine(self.policy, nested, deck.slots, longest, writer.python, writer.quantization)
        self._engines[deck.by_target] = engine
        return engine

    @torch.no_grad()
    def _require_same_model(
        self, nested: Nested, prompts: Sequence[Any], written: Written, rows: Sequence[int], group_size: int
    ) -> None:
        """Raise UsageError where log mu of some completions is not what the policy itself gives them."""
        mask = torch.from_numpy(np.arange(written.tokens.shape[1]) < written.length[rows, None])
        theirs = torch.from_numpy(written.logp[rows])
        of = [torch.as_tensor(prompts[row // group_size]) for row in rows]
        ours = self.policy.logprobs(of, torch.from_numpy(written.tokens[rows]), mask, layers=nested)
        gap = float(_mean_gap(ours.to(theirs), theirs, mask))
        if not gap <= SAME_MODEL:
            raise UsageError(
                f"vLLM computes another model: its log-probabilities differ from this policy's by {gap:.3g} nats a "
                "token; use writer='own', or dtype=float32 if that is rounding"
            )


def _mean_gap(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    return (ours - theirs)[mask].abs().mean()


def episode_seed(seed: int, episode: int) -> int:
    """Of an episode's completion: 63 bits that depend on both numbers."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Written:
    """Completions that exist already, given token by token to whoever plays them.

    Attributes:
        first: the number of the first of E episodes.
        prompt_length: [E] int64.
        length: [E] int64, tokens of each completion.
        tokens: [E, T] int64.
        logp: [E, T] float32.
    """

    first: int
    prompt_length: NDArray[np.int64]
    length: NDArray[np.int64]
    tokens: NDArray[np.int64]
    logp: NDArray[np.float32]

    def act(
        self, obs: dict[str, NDArray[np.int64]], start: NDArray[np.bool_], episode: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As ``Behavior.act``.

        Raises:
            RuntimeError: an episode goes on where its completion has ended.
        """
        prefix = obs["length"][:, 0]
        actions, logp = np.zeros(len(prefix), dtype=np.int64), np.zeros(len(prefix), dtype=np.float32)
        live = np.flatnonzero(prefix > 0)
        rows = episode[live] - self.first
        position = prefix[live] - self.prompt_length[rows]
        if (position >= self.length[rows]).any():
            ended = rows[position >= self.length[rows]][0] + self.first
            raise RuntimeError(f"episode {ended} goes on where its completion has ended")
        actions[live], logp[live] = self.tokens[rows, position], self.logp[rows, position]
        return actions, logp
