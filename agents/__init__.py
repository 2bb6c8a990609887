"""The algorithm zoo. Importing it registers every agent, correction, advantage, aggregation, problem sampler,
schedule, anchor, batch source, reward and rollout writer; the names are in ``registry``."""

from agents import corrections, rivals, schedules  # noqa: F401 (registers them)
from agents.batches import experts, problem_samplers, sources  # noqa: F401
from agents.objective import advantages, aggregation, anchors, rewards  # noqa: F401
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
    "collect",
]
