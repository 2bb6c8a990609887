"""The algorithm zoo. Importing it registers every agent, correction, advantage, aggregation, problem sampler and
schedule."""

from agents import advantages, aggregation, corrections, problem_samplers, schedules
from agents.reft import ReFT
from agents.rollout import Rollout, collect
from agents.sb3_ppo import SB3PPO
from agents.trl_grpo import TRLGRPO

__all__ = [
    "SB3PPO",
    "TRLGRPO",
    "ReFT",
    "Rollout",
    "advantages",
    "aggregation",
    "collect",
    "corrections",
    "problem_samplers",
    "schedules",
]
