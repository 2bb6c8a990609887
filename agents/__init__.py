"""The algorithm zoo. Importing it registers every agent, correction, advantage, aggregation, problem sampler,
schedule, anchor, batch source and reward."""

from agents import corrections, rivals, schedules
from agents.batches import experts, problem_samplers, sources
from agents.objective import advantages, aggregation, anchors, rewards
from agents.reft import ReFT
from agents.rollout import Rollout, collect
from agents.sb3_ppo import SB3PPO
from agents.sft import SFT
from agents.trl_grpo import TRLGRPO

__all__ = [
    "SB3PPO",
    "SFT",
    "TRLGRPO",
    "ReFT",
    "Rollout",
    "advantages",
    "aggregation",
    "anchors",
    "collect",
    "corrections",
    "experts",
    "problem_samplers",
    "rewards",
    "rivals",
    "schedules",
    "sources",
]
