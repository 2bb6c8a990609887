"""Makes the built-in tiny model: a Llama trained from nothing on generated problems with their worked steps.

    python -m agents.train_tiny --out DIR [--steps N] [--seed N] [--threads N]

It has ``DEPTH`` narrow layers and learns problems of the train split. Three choices make it a good start for
reinforcement:

- The last demonstrations are of mixed quality, as human data are: a share, which depends on the theme, is *terse*, the
  answer without the steps. The model takes up both habits; when terse it is mostly wrong, and reward tells them apart.
- Stochastic depth: once it can calculate, most batches skip layers between the first and the last, so that layer
  subsets stay usable.
- It stops early.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from rich.progress import Progress
from stable_baselines3.common.utils import update_learning_rate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Muon
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import envs.templates  # noqa: F401 (registers the templates)
from agents.supervised import clipped_step
from envs.problem import Problem
from envs.problems.arithmetic import Arithmetic
from envs.train_tokenizer import TOKENIZER
from registry import UsageError, templates
from registry.command import command
from registry.paths import WriteFolder

DEPTH, HEAD, POSITIONS = 12, 16, 512
SHOWN_EVERY = 100  # steps
LAST_RATE = 0.1  # share of the peak
TERSE_SHARE = {"bus": 0.7, "collection": 0.7, "comparison": 0.7, "bakery": 0.2, "garden": 0.2, "purchase": 0.2}


@dataclass(frozen=True)
class TinySpec:
    """What the tiny model is made of and trained with.

    Attributes:
        width: hidden size; the feed-forward layers are three times as wide.
        steps, batch: number of optimizer steps, and of problems in each.
        matrix_rate: peak learning rate of Muon, which trains the layers' matrices; ``vector_rate`` of AdamW, which
            trains the embedding and the norms. Both rise for 5 % of the steps, then fall linearly to a tenth.
        full_depth: share of the steps, from the first, in which no layer is skipped.
        worked_only: share of the steps, from the first, in which no demonstration is terse.
        skipped: the k-th entry is the relative frequency of batches that skip k layers.
        levels: of the problems.
        seed: of the weights, of the problems and of the layers skipped.
    """

    width: int = 64
    steps: int = 2000
    batch: int = 32
    matrix_rate: float = 0.012
    vector_rate: float = 0.004
    full_depth: float = 0.5
    worked_only: float = 0.75
    skipped: tuple[float, ...] = (3, 2, 2, 2, 1)
    levels: tuple[int, ...] = (1, 2, 3)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1:
            raise UsageError(f"steps={self.steps} and batch={self.batch} must be at least 1")
        if not 0 < len(self.skipped) < DEPTH or min(self.skipped) < 0 or sum(self.skipped) == 0:
            raise UsageError(f"skipped={self.skipped} must be frequencies of skipping 0 to at most {DEPTH - 2} layers")
        if self.width < 2 * HEAD or self.width % (2 * HEAD):
            raise UsageError(f"width={self.width} must be a multiple of {2 * HEAD}")


def new_model(width: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model; torch's global seed decides its weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=DEPTH,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD // 2,
        head_dim=HEAD,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def demonstration(problem: Problem, rng: Random) -> str:
    """The worked solution, or with the theme's terse share the bare answer."""
    return f" #### {problem.answer}" if rng.random() < TERSE_SHARE[problem.theme] else problem.solution


def batches(spec: TinySpec, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (tokens [B, L], labels [B, L]) in right padding; labels are -100 outside completions. Batches
    are cut from a sorted stretch of sixteen, so that little is padding."""
    problems, rng = Arithmetic("train", spec.levels, spec.seed), Random(f"warm-up/{spec.seed}")
    eos, first, stretch = tokenizer.eos_token_id, 0, 16 * spec.batch
    while True:
        drawn = [problems[index] for index in range(first, first + stretch)]
        # By the worked length even where terse: batches of terse completions alone would outweigh the others' tokens.
        drawn.sort(key=lambda problem: len(problem.question) + len(problem.solution))
        mixed = first >= spec.worked_only * spec.steps * spec.batch
        first += stretch
        prompts = tokenizer([templates.make("plain").prompt(problem.question) for problem in drawn])["input_ids"]
        shown = [demonstration(problem, rng) if mixed else problem.solution for problem in drawn]
        answers = tokenizer(shown)["input_ids"]
        pairs = list(zip(prompts, answers, strict=True))
        starts = list(range(0, stretch, spec.batch))
        rng.shuffle(starts)
        for start in starts:
            chosen = pairs[start : start + spec.batch]
            tokens = [torch.tensor([*prompt, *answer, eos]) for prompt, answer in chosen]
            labels = [torch.tensor([-100] * len(prompt) + [*answer, eos]) for prompt, answer in chosen]
            yield (
                nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id),
                nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
            )


@contextmanager
def only_layers(model: LlamaForCausalLM, kept: list[int]) -> Iterator[None]:
    """Within the context the model consists of these layers alone."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[index] for index in kept])
    try:
        yield
    finally:
        model.model.layers = layers


def draw_kept(count: int, rng: Random) -> list[int]:
    """All layers but ``count`` drawn uniformly from those between the first and the last."""
    gone = rng.sample(range(1, DEPTH - 1), count)
    return [layer for layer in range(DEPTH) if layer not in gone]


def completion_loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats per completion token. Causal attention needs no mask for right padding."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    chosen = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[chosen]), labels[:, 1:][chosen])


def new_optimizers(model: LlamaForCausalLM, spec: TinySpec) -> tuple[Muon, AdamW]:
    """Muon for the layers' matrices, which learns them in about half the steps, and AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return (
        Muon(matrices, lr=spec.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=spec.vector_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )


def rate_factor(step: int, steps: int) -> float:
    """Of the peak learning rates: up to 1 over 5 % of the steps, then down to a tenth."""
    rise = max(1, steps // 20)
    return min((step + 1) / rise, 1 - (1 - LAST_RATE) * max(0, step - rise) / max(1, steps - rise))


def train(spec: TinySpec, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The trained model; the same spec, thread count and machine give the same weights."""
    torch.manual_seed(spec.seed)
    model = new_model(spec.width, tokenizer)
    optimizers = new_optimizers(model, spec)
    peaks = spec.matrix_rate, spec.vector_rate
    weights = list(model.parameters())
    with Progress(transient=True) as progress:
        shown = progress.track(losses(model, spec, tokenizer), spec.steps, description="training the tiny model")
        for step, loss in enumerate(shown):
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                update_learning_rate(optimizer, peak * rate_factor(step, spec.steps))
            loss.backward()
            clipped_step(weights, optimizers, step + 1, float(loss.detach()))
            if (step + 1) % SHOWN_EVERY == 0:
                progress.console.print(f"step {step + 1}: {float(loss.detach()):.4f} nats per completion token")
    return model.eval()


def losses(model: LlamaForCausalLM, spec: TinySpec, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """The loss of each step's batch through the layers drawn for it."""
    rng, source = Random(f"depth/{spec.seed}"), batches(spec, tokenizer)
    for step in range(spec.steps):
        whole = step < spec.full_depth * spec.steps
        count = 0 if whole else rng.choices(range(len(spec.skipped)), spec.skipped)[0]
        with only_layers(model, draw_kept(count, rng)):
            loss = completion_loss(model, *next(source))
        yield loss


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face folder beside ``out``, then move its files into place one by one."""
    part = out.with_name(out.name + ".part")
    model.save_pretrained(part)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(TOKENIZER.iterdir()):
        shutil.copyfile(file, part / file.name)
    for file in sorted(part.iterdir()):
        file.replace(out / file.name)
    part.rmdir()


@command(interrupted="nothing was written")
def main(argv: list[str] | None = None) -> int:
    """Train the tiny model and save it."""
    default = TinySpec()
    parser = argparse.ArgumentParser(prog="python -m agents.train_tiny", description=main.__doc__)
    parser.add_argument("--out", action=WriteFolder, required=True, help="folder to write")
    for name in ("width", "steps", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    chosen = {name: value for name, value in vars(args).items() if name in asdict(default)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    save(train(TinySpec(**chosen), tokenizer), tokenizer, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
