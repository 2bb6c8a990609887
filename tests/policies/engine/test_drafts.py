"""Drafts: what is written is what plain decoding writes, whoever drafts; with lenience, its exact law.

Closed forms by enumeration over a vocabulary of five, Pearson's chi-square where a real engine draws, and the same test
on a rule that is wrong, which it has to reject.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from policies import Policy
from policies.engine.drafts import Draft, Drafter, Drafting, Lenience, StoredDrafts
from policies.engine.sampling import SamplingSpec, draw, uniforms
from registry import UsageError
from tests.oracles.decoding import LONGEST, observe
from tests.oracles.policy_checkpoints import LAYERS, random_model

FULL = tuple(range(LAYERS))
LEVEL = 1e-4  # below it a law is rejected
V, T = 5, 3


class Table:
    """A decoder of V tokens whose next-token distribution is looked up by the last two tokens: hidden states are
    logits."""

    longest = 8

    def __init__(self, seed: int) -> None:
        self.logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(V + 1, V, V)) * 1.5).float()

    def after(self, prefix: list[int]) -> np.ndarray:
        return self.logits[prefix[-2] if len(prefix) > 1 else V, prefix[-1]].double().softmax(-1).numpy()

    def extend(self, ids, first, last, start, slots) -> torch.Tensor:
        ends = [(slot, n) for slot, a, b in zip(slots, first, last, strict=True) for n in range(a, b + 1)]
        return torch.stack([self.logits[ids[s, n - 2] if n > 1 else V, ids[s, n - 1]] for s, n in ends])

    def draw(self, hidden, uniform, temperature):
        return draw(hidden.clone(), uniform, temperature)

    def logp(self, hidden, token, temperature):
        return hidden.log_softmax(-1).gather(1, token[:, None])[:, 0]

    def law(self, prompt: list[int]) -> dict[tuple[int, ...], float]:
        """Of T tokens."""
        laws = {}
        for text in itertools.product(range(V), repeat=T):
            laws[text] = math.prod(self.after([*prompt, *text[:n]])[text[n]] for n in range(T))
        return laws


def refuse(*_: object) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("every slot has a draft")


def written(table: Table, prompt: list[int], draft: Draft, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """[episodes, T] tokens and log mu, each slot with the same draft."""

    class Same:
        def propose(self, ids, length, start, episode, slots, live):
            return [draft if start[slot] else None for slot in slots]

    def plain(ids, length, start, episode, active):
        hidden = table.extend(ids, length[active], length[active], start, active)
        token, logp = table.draw(hidden, torch.from_numpy(uniforms(9, episode[active], length[active])), 1.0)
        return token.numpy(), logp.numpy()

    drafting = Drafting(table, episodes, SamplingSpec(seed=9), [Same()], plain)
    ids = np.zeros((episodes, table.longest), np.int64)
    ids[:, : len(prompt)] = prompt
    every, logps = np.arange(episodes), []
    for n in range(T):
        length = np.full(episodes, len(prompt) + n)
        ids[:, len(prompt) + n], logp = drafting.next(ids, length, length == len(prompt), every, every)
        logps.append(logp)
    return ids[:, len(prompt) : len(prompt) + T], np.stack(logps, 1)


def p_value(counts: dict, law: dict) -> float:
    """Pearson's, cells expected below 5 pooled."""
    total = sum(counts.values())
    cells = [(counts.get(one, 0), total * p) for one, p in law.items()]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = (sum(o for o, e in cells if e < 5), sum(e for o, e in cells if e < 5))
    large += [rest] if rest[1] > 0 else []
    return float(chi2.sf(sum((o - e) ** 2 / e for o, e in large), len(large) - 1))


def counted(rows: np.ndarray) -> dict[tuple[int, ...], int]:
    texts, times = np.unique(rows, axis=0, return_counts=True)
    return {tuple(text): int(n) for text, n in zip(texts.tolist(), times, strict=True)}


def lenient_law(table: Table, prompt: list[int], draft: list[int], nats: float) -> dict[tuple[int, ...], float]:
    """Of T tokens given a draft: nu(y) = min(1, e^l pi(y)), the others share what is left by pi; pi after the first
    that is not the draft's."""
    laws = {}
    for text in itertools.product(range(V), repeat=T):
        p, on = 1.0, True
        for n in range(T):
            pi = table.after([*prompt, *text[:n]])
            if on and n < len(draft):
                y = draft[n]
                a = min(1.0, math.exp(nats) * pi[y])
                p *= a if text[n] == y else (1 - a) * pi[text[n]] / (1 - pi[y])
                on = text[n] == y
            else:
                p *= pi[text[n]]
        laws[text] = p
    return laws


@pytest.mark.parametrize("nats", [0.0, 0.4, 1.0])
def test_the_law_of_what_is_written_is_the_closed_form(nats: float) -> None:
    table, prompt, draft = Table(1), [2], [3, 1, 4]
    law = lenient_law(table, prompt, draft, nats)
    assert sum(law.values()) == pytest.approx(1)
    if not nats:
        assert law == pytest.approx(table.law(prompt))
    lenience = Lenience("draw", nats) if nats else None
    proposal = Draft(np.array(draft), False, np.zeros(T, np.float32), lenience)
    tokens, logp = written(table, prompt, proposal, 10_000)
    assert p_value(counted(tokens), law) > LEVEL
    for text, at in zip(*np.unique(tokens, axis=0, return_index=True), strict=True):
        assert logp[at].sum() == pytest.approx(math.log(law[tuple(text.tolist())]), abs=1e-4)
    if nats:
        assert p_value(counted(tokens), table.law(prompt)) < LEVEL  # the target's own law it is not


def test_lenience_by_ratio_has_the_law_and_the_bounds_that_are_stated() -> None:
    """Over drafts from mu: min(mu, e^l pi) + R pi at the first place; without lenience within R (1 - R) of pi."""
    pi, mu = (Table(seed).after([2]) for seed in (1, 7))
    rng = np.random.default_rng(0)
    n = 200_000
    draft, drawn = rng.choice(V, n, p=mu), rng.choice(V, n, p=pi)
    for nats in (0.0, 0.5):
        kept, logp = Lenience("ratio", nats).judge(
            drawn, np.log(pi)[drawn], draft, np.log(pi)[draft], np.log(mu)[draft], rng.random(n)
        )
        tokens = np.where(kept, draft, drawn)
        least = np.minimum(mu, math.exp(nats) * pi)
        law = least + (1 - least.sum()) * pi
        assert p_value(counted(tokens[:, None]), {(v,): law[v] for v in range(V)}) > LEVEL
        np.testing.assert_allclose(logp, np.log(pi)[tokens])
        assert (law <= (math.exp(nats) + 1 - least.sum()) * pi + 1e-12).all()
        if not nats:
            assert 0 < abs(law - pi).sum() / 2 <= least.sum() * (1 - least.sum())


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(random_model("llama"))


PROMPT = [5, 9, 30, 2]
EPISODES = 3000


def first_tokens(policy: Policy, steps: int, episodes: int, **given) -> tuple[np.ndarray, np.ndarray, object]:
    """[episodes, steps] tokens and log mu of a prompt, in waves of 250 slots."""
    tokens, logps, slots = np.zeros((episodes, steps), int), np.zeros((episodes, steps)), 250
    behavior = policy.behavior(FULL, slots, LONGEST, temperature=0.5, seed=4, **given)
    for wave in range(0, episodes, slots):
        ids = np.tile(np.array(PROMPT + [0] * (LONGEST - len(PROMPT))), (slots, 1))
        episode = wave + np.arange(slots)
        for n in range(steps):
            obs = {"input_ids": ids, "length": np.full((slots, 1), len(PROMPT) + n)}
            tokens[episode, n], logps[episode, n] = behavior.act(obs, np.full(slots, n == 0), episode)
            ids[:, len(PROMPT) + n] = tokens[episode, n]
    return tokens, logps, behavior


def other_policy() -> Policy:
    torch.manual_seed(3)
    model = random_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Policy(model)


@pytest.fixture(scope="module")
def stored() -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Completions of other weights, one an episode."""
    tokens, logps, _ = first_tokens(other_policy(), 6, EPISODES)
    return {episode: (row, mu.astype(np.float32)) for episode, (row, mu) in enumerate(zip(tokens, logps, strict=True))}


DRAFTERS = {
    "layers": {"drafter": Drafter((0, 1, 3), tokens=3, rows=1000)},
    "one layer": {"drafter": Drafter((0,), tokens=5, rows=1000)},
}


@pytest.mark.parametrize("which", ["stored", *DRAFTERS, "both"])
def test_tokens_are_those_of_plain_decoding(policy: Policy, stored: dict, which: str) -> None:
    given = DRAFTERS.get(which, {"stored": StoredDrafts(stored)})
    if which == "both":
        given = {**given, **DRAFTERS["layers"]}
    plain, plain_logp, _ = first_tokens(policy, 9, 500)
    tokens, logp, behavior = first_tokens(policy, 9, 500, **given)
    assert (tokens == plain).all()
    np.testing.assert_allclose(logp, plain_logp, atol=1e-4)
    drafting = behavior.drafting
    assert 0 < drafting.accepted < drafting.proposed
    if which == "stored":  # as often as the two writers agree from the beginning on
        agree = np.array([row == one[0][:6] for row, one in zip(plain[:, :6], stored.values(), strict=False)])
        assert drafting.accepted == np.logical_and.accumulate(agree.all(2) if agree.ndim == 3 else agree, 1).sum()
        assert (drafting.judged, drafting.proposed) == (500, 3000)


def law_at(policy: Policy, prefix: list[int]) -> np.ndarray:
    """[V] at temperature 1/2."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([prefix])).logits[0, -1].double()
    return (logits / 0.5).softmax(-1).numpy()


def always_accepts(self, drawn, drawn_logp, draft, logp, mu, v):
    return np.ones(len(draft), bool), logp


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "always accepts"])
def test_the_law_of_a_token_at_given_prefixes(policy: Policy, stored: dict, monkeypatch, wrong: bool) -> None:
    """By chi-square, at the first place and at the second after each of the most frequent first tokens."""
    lenience = Lenience()
    if wrong:
        monkeypatch.setattr(Lenience, "judge", always_accepts)
        lenience = Lenience("ratio", 0.0)
    tokens, _, _ = first_tokens(policy, 2, EPISODES, stored=StoredDrafts(stored, lenience))
    values = [p_value(counted(tokens[:, :1]), {(v,): p for v, p in enumerate(law_at(policy, PROMPT))})]
    firsts, times = np.unique(tokens[:, 0], return_counts=True)
    for token in firsts[np.argsort(-times)][:4]:
        after = tokens[tokens[:, 0] == token, 1:]
        law = law_at(policy, [*PROMPT, int(token)])
        values.append(p_value(counted(after), {(v,): p for v, p in enumerate(law)}))
    assert (min(values) < LEVEL) if wrong else (min(values) > LEVEL / 5), values


def test_log_mu_with_lenience_is_that_of_what_was_written(policy: Policy, stored: dict) -> None:
    """Token by token by a forward of its own, from the draft and the text alone."""
    nats = 2.5
    tokens, logps, _ = first_tokens(policy, 6, 250, stored=StoredDrafts(stored, Lenience("draw", nats)))
    lenient = 0
    for episode in range(40):
        on = True
        for n in range(6):
            pi = law_at(policy, [*PROMPT, *tokens[episode, :n].tolist()])
            x, y = tokens[episode, n], stored[episode][0][n]
            a = min(1.0, math.exp(nats) * pi[y])
            nu = pi[x] if not on else a if x == y else (1 - a) * pi[x] / (1 - pi[y])
            assert logps[episode, n] == pytest.approx(math.log(nu), abs=2e-3)
            on = on and x == y
            lenient += on
    assert lenient > 8


def test_a_prefix_that_somebody_edits_is_answered_as_it_stands(policy: Policy, stored: dict) -> None:
    behavior = policy.behavior(FULL, 1, LONGEST, seed=4, temperature=0.5, stored=StoredDrafts(stored))
    plain = policy.behavior(FULL, 1, LONGEST, seed=4, temperature=0.5)
    episode = next(e for e in range(100) if len(set(stored[e][0][:3])) > 1)
    prefix, start = list(PROMPT), True
    for n in range(6):
        if n == 2:
            prefix[-1] = (prefix[-1] + 1) % 50
        token, logp = behavior.act(observe([prefix]), np.array([start]), np.array([episode]))
        expected, expected_logp = plain.act(observe([prefix]), np.array([start]), np.array([episode]))
        assert token[0] == expected[0] and logp[0] == pytest.approx(expected_logp[0], abs=1e-4)
        prefix, start = [*prefix, int(token[0])], False
    assert behavior.drafting.proposed == 6  # of the only slot, which has the number 0


def test_a_drafter_rests_where_many_slots_are_live(policy: Policy) -> None:
    _, _, behavior = first_tokens(policy, 4, 250, drafter=Drafter((0, 1), tokens=2, rows=249))
    assert behavior.drafting.judged == 0


def test_what_is_no_rule_is_refused() -> None:
    for rule, nats in (("exact", 0.0), ("draw", -0.1), ("ratio", math.inf)):
        with pytest.raises(UsageError):
            Lenience(rule, nats)
