"""Our off-policy corrections in other trainers: prime-rl's custom loss and slime's importance-sampling function.

prime-rl, in its configuration:

    [trainer.loss]
    type = "custom"
    import_path = "integrations.corrections.prime_rl_loss"
    kwargs = { correction = "truncated-is", cap = 2.0 }

slime, on its command line (``correction`` is a key of the file of ``--custom-config-path``):

    --use-tis --custom-tis-function-path integrations.corrections.slime_tis

Both see a few sequences at a time and neither knows groups, so corrections of the scope ``group`` or ``batch`` are
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import agents  # noqa: F401 (registers the corrections)
from agents.corrections.correction import SCOPES, traits, weigh
from agents.rollout import Rollout
from registry import UsageError, corrections

SLIMES_DEFAULT = "truncated-is"


def prime_rl_loss(inputs: Any, correction: str = "token-is", **fields: Any) -> Any:
    """-sum_t W_t A log pi_t of one sequence of T tokens, with a correction's weight W of pi against mu, detached.

    Args:
        inputs: prime-rl's ``LossInputs``: ``trainer_logprobs`` (log pi) and ``inference_logprobs`` (log mu),
            ``advantages`` and ``loss_mask``, each [T]; ``loss_weights`` [T] where it has them.
        correction: an id of ``registry.corrections``.
        fields: of the correction.

    Returns:
        prime-rl's ``LossOutputs``; its metric ``correction_weight`` is the mean of W.

    Raises:
        UsageError: no such correction or field, one of the scope group or batch or one that needs log-probabilities of
            pi_old, or advantages that differ within the sequence.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    chosen = _made(correction, fields, widest="sequence")
    mask, logp = inputs.loss_mask.bool(), inputs.trainer_logprobs
    own = inputs.advantages[mask]
    if len(own) and not bool((own == own[0]).all()):
        raise UsageError("the advantages differ within a sequence: a correction weighs a completion with one of them")
    advantage = own[:1].float() if len(own) else torch.zeros(1, device=logp.device)
    rollout = _rollout(mask[None], inputs.inference_logprobs[None])
    weight = weigh(chosen, logp.detach()[None], rollout, advantage)[0]
    slope = weight.to(logp.dtype) * inputs.advantages
    if getattr(inputs, "loss_weights", None) is not None:
        slope = slope * inputs.loss_weights
    loss = -torch.where(mask, slope * logp, 0.0).sum()
    return LossOutputs(loss=loss, metrics={"correction_weight": weight[mask].mean() if len(own) else weight.sum()})


def slime_tis(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **_: Any,
) -> tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]:
    """slime's policy loss weighed by a correction of pi_old against mu, as in decoupled PPO (arXiv 2110.00641).

    Args:
        args: slime's arguments; ``args.correction`` is an id of ``registry.corrections``, or ``{"id": ..., field:
            value}``; ``truncated-is`` without it.
        pg_loss: [sum of T_i], of all tokens of B sequences, one after another.
        train_log_probs, rollout_log_probs, loss_masks: B tensors [T_i]: log pi_old, log mu, and which tokens count.

    Returns:
        The loss, the masks as they were, and the metric ``correction_weight``, W of each token.

    Raises:
        UsageError: no such correction, or one that this function cannot serve: of the scope group or batch, a trust
            region, one that depends on advantages, or one of whole sequences where their tokens are shared out
            (context_parallel_size above 1).
    """
    given = getattr(args, "correction", None) or SLIMES_DEFAULT
    id, fields = (given, {}) if isinstance(given, str) else (given.get("id", ""), {**given})
    fields.pop("id", None)
    shared_out = getattr(args, "context_parallel_size", 1) > 1
    chosen = _made(id, fields, widest="token" if shared_out else "sequence")
    if traits(chosen).trust_region:
        raise UsageError(
            f"correction {id!r} holds pi / pi_old, which slime's own loss clips: take one of pi / mu alone"
        )
    lengths = [len(one) for one in train_log_probs]
    mask = pad_sequence([one.bool() for one in loss_masks], batch_first=True)
    logp = pad_sequence([one.detach().float() for one in train_log_probs], batch_first=True)
    rollout = _rollout(mask, pad_sequence([one.float() for one in rollout_log_probs], batch_first=True))
    signs = torch.ones(len(lengths), device=logp.device)
    weight, other = (weigh(chosen, logp, rollout, sign * signs) for sign in (1.0, -1.0))
    if not torch.equal(weight, other):
        raise UsageError(f"correction {id!r} depends on advantages, which slime does not hand over here: take another")
    flat = torch.cat([row[:length] for row, length in zip(weight, lengths, strict=True)])
    return pg_loss * flat.to(pg_loss.dtype), loss_masks, {"correction_weight": flat}


def _made(id: str, fields: dict[str, Any], widest: str) -> Any:
    chosen = corrections.make(id, **fields)
    scope = traits(chosen).scope
    if SCOPES.index(scope) > SCOPES.index(widest):
        raise UsageError(
            f"correction {id!r} needs a whole {scope} at once, and here is a {widest} at most: take another"
        )
    return chosen


def _rollout(mask: Tensor, behavior_logp: Tensor) -> Rollout:
    """What a correction of whole sequences looks at."""
    count = len(mask)
    return Rollout(
        prompts=(),
        tokens=torch.zeros_like(mask, dtype=torch.int64),
        mask=mask,
        behavior_logp=behavior_logp.detach(),
        reward=torch.zeros(count, device=mask.device),
        group=torch.arange(count, device=mask.device),
    )
