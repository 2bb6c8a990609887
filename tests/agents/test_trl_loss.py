"""A whole update step against TRL's GRPO loss of the same batch through transformers' own forward: gradients of all
weights. The formulas by themselves are in test_published_losses.py, test_anchors.py and test_entropy.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from agents import ReFT, Rollout
from envs.vector import MathReasonVector
from tests.agents.test_published_losses import trl_stand_in
from tests.oracles.reft_agents import gradient_of, write_batch

KL = {"id": "kl", "beta": 0.3}
CASES = [
    ("grpo", {}, {"aggregation": "sequence-mean"}),
    ("dapo", {"epsilon_high": 0.28}, {"correction": {"id": "ppo-clip", "eps_high": 0.28}}),
    ("grpo", {"beta": 0.3}, {"aggregation": "sequence-mean", "anchor": KL}),
    ("dapo", {"beta": 0.3, "corrected": True}, {"anchor": {**KL, "corrected": True}}),
    ("dapo", {"delta": 1.5}, {"correction": {"id": "ppo-clip", "dual_clip": 1.5}}),
    ("dapo", {"mask_truncated": True, "beta": 0.3}, {"mask_truncated": True, "anchor": KL}),
    ("grpo", {"mask_truncated": True}, {"mask_truncated": True, "aggregation": "sequence-mean"}),
    ("dr_grpo", {"mask_truncated": True}, {"mask_truncated": True, "aggregation": {"id": "constant", "max_tokens": 8}}),
    ("bnpo", {"entropy_coef": 0.3}, {"entropy_bonus": 0.3}),
]


def batch(agent: ReFT) -> tuple[Rollout, Tensor]:
    """A rollout whose ratios to pi_old lie on both sides of every clip, and whose reference is another model."""
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)

    def near(spread: float) -> Tensor:
        return now + spread * torch.randn(now.shape, generator=generator) * rollout.mask

    now = agent.update.score(rollout)
    old = near(0.4)
    # what wrote the tokens is pi_old, as TRL has it
    return replace(rollout, old_logp=old, behavior_logp=old, reference_logp=near(0.5)), agent.advantage(
        rollout.reward, rollout.group
    )


def trl_gradient(folder: str, rollout: Rollout, advantage: Tensor, loss_type: str, settings: dict[str, Any]) -> Tensor:
    trainer = pytest.importorskip("trl", reason="TRL is not installed").GRPOTrainer
    settings = dict(settings)
    truncated = rollout.truncated if settings.pop("mask_truncated", False) else torch.zeros(len(rollout)).bool()
    corrected = settings.pop("corrected", False)
    mask = rollout.mask & ~truncated[:, None]
    model = LlamaForCausalLM.from_pretrained(folder)

    def scored(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        logp, entropy = [], []
        for row in range(len(rollout)):
            prompt = rollout.prompts[row]
            logits = model(torch.cat([prompt, rollout.tokens[row]])[None]).logits[0, len(prompt) - 1 : -1]
            distribution = torch.distributions.Categorical(logits=logits)
            logp.append(distribution.log_prob(rollout.tokens[row]))
            entropy.append(distribution.entropy())
        return torch.stack(logp), torch.stack(entropy), None

    given = {"top_entropy_quantile": 1.0, "max_completion_length": 8, "use_adaptive_entropy": False, **settings}
    stand_in = trl_stand_in(torch.zeros(()), loss_type, given)
    stand_in.args.use_bias_correction_kl = corrected
    stand_in._entropy_bonus_enabled = "entropy_coef" in settings
    stand_in._get_per_token_logps_and_entropies = scored
    inputs = {
        "prompt_ids": torch.zeros(len(rollout), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(rollout), 1, dtype=torch.long),
        "completion_ids": rollout.tokens,
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": rollout.old_logp,
        "ref_per_token_logps": rollout.reference_logp,
        "num_items_in_batch": mask.sum(),
    }
    trainer._compute_loss(stand_in, model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("case", CASES, ids=["-".join([c[0], *c[1]]) for c in CASES])
def test_an_update_step_is_trls(folder: str, case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    loss_type, settings, arguments = case
    stops = tuple(range(2, 512, 6))  # a random model then often stops before its budget ends
    envs = MathReasonVector(num_envs=16, max_new_tokens=8, reward="random", copy=False, stop_token_ids=stops)
    given = {"correction": "ppo-clip", "group_size": 4, "problems_per_batch": 6, "seed": 3, **arguments}
    agent = ReFT(folder, envs, microbatch_tokens=300, **given)
    rollout, advantage = batch(agent)
    assert 0 < int(rollout.truncated.sum()) < len(rollout) and (advantage == 0).any()
    found = gradient_of(agent, lambda: agent.update._step(rollout, advantage, None, None))
    expected = trl_gradient(folder, rollout, advantage, loss_type, settings)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
