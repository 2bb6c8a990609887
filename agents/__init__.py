"""The algorithm zoo. Importing it registers every agent, correction, advantage, aggregation and problem sampler."""

from agents import advantages, aggregation, corrections, problem_samplers
from agents.reft import ReFT
from agents.rollout import Rollout, collect
from agents.sb3_ppo import SB3PPO
from agents.sft import SFT

__all__ = [
    "SB3PPO",
    "SFT",
    "ReFT",
    "Rollout",
    "advantages",
    "aggregation",
    "collect",
    "corrections",
    "problem_samplers",
]
