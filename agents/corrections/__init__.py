"""The zoo of off-policy corrections and trust regions, each a detached weight; importing this registers all of them."""

from agents.corrections import decoupled, group, importance, masks, traces, trust_regions  # noqa: F401 (registers them)
from agents.corrections.correction import (
    GEOMETRIES,
    OPERATORS,
    SCOPES,
    Correction,
    Product,
    Scope,
    Traits,
    ZeroWeights,
    exp,
    log_r,
    log_rho,
    sampled_logp,
    traits,
    warn_zero,
    weigh,
)

__all__ = [
    "GEOMETRIES",
    "OPERATORS",
    "SCOPES",
    "Correction",
    "Product",
    "Scope",
    "Traits",
    "ZeroWeights",
    "exp",
    "log_r",
    "log_rho",
    "sampled_logp",
    "traits",
    "warn_zero",
    "weigh",
]
