"""Trains the built-in tokenizer: ``python -m envs.train_tokenizer --out DIR``.

Byte-level BPE, hence lossless on any text, on generated problems in the plain template: every digit is a token of its
own (with or without the space before it), and the template's words are single tokens. No BOS; ``<|endoftext|>`` ends a
completion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import envs.templates  # noqa: F401 (registers the templates)
from envs.problems.arithmetic import Arithmetic
from envs.problems.scenes import LEVELS
from registry import templates
from registry.command import command
from registry.paths import WriteFolder

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 512
TOKENIZER = Path(__file__).parent / "tokenizer"
PIECES = r" ?\p{N}| ?[^\s\p{L}\p{N}]+| ?\p{L}+|\s+(?!\S)|\s+"


def train(count: int = 20000) -> PreTrainedTokenizerFast:
    """The tokenizer trained on ``count`` problems of every level."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = Arithmetic("train", tuple(LEVELS))
    plain = templates.make("plain")
    texts = (plain.prompt(p.question) + p.solution for p in map(problems.__getitem__, range(count)))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


@command(errors=(OSError,))
def main(argv: list[str] | None = None) -> int:
    """Train and save in Hugging Face form."""
    parser = argparse.ArgumentParser(prog="python -m envs.train_tokenizer", description=main.__doc__)
    parser.add_argument(
        "--out", action=WriteFolder, required=True, help="folder to write; the built-in one's is " + str(TOKENIZER)
    )
    args = parser.parse_args(argv)
    train().save_pretrained(args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
