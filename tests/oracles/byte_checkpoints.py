"""Tiny real folders: byte tokenizers with any special tokens, and random checkpoints that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IN_PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
THINKING = CHATML.replace("assistant\n", "assistant\n<think>\n")  # its generation prompt opens a thought


def byte_tokenizer(
    special: tuple[str, ...] = (), eos: str = "</s>", bos: str | None = None, adds: str = "", **settings: Any
) -> PreTrainedTokenizerFast:
    """Ids 0..255 are bytes, then come BOS, EOS and ``special``. ``adds``: which of ``bos`` and ``eos`` the tokenizer
    puts around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _with_special(backend, special, eos, bos, adds, **settings)


def metaspace_tokenizer(
    special: tuple[str, ...] = (), eos: str = "</s>", bos: str | None = None, adds: str = "", **settings: Any
) -> PreTrainedTokenizerFast:
    """The same as Llama 2 has it: a text begins with a blank, which decoding takes away again; a letter is a token, or
    else its bytes are."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!#=+-*/(){}\\<>$"
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    model = models.BPE({name: n for n, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special(backend, special, eos, bos, adds, **settings)


def _with_special(
    backend: Tokenizer, special: tuple[str, ...], eos: str, bos: str | None, adds: str, **settings: Any
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (bos, eos, *special) if t])
    before = f"{bos} " if bos and "bos" in adds else ""
    after = f" {eos}" if "eos" in adds else ""
    if before or after:
        around = [(token, backend.token_to_id(token)) for token in f"{before}{after}".split()]
        backend.post_processor = processors.TemplateProcessing(single=f"{before}$A{after}", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, **settings)


def write_checkpoint(folder: Path, family: str = "llama", vocabulary: int = 300, shard: str = "5GB", **changes: Any):
    """A random CausalLM of two layers, saved to ``folder``; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family, **{**shapes, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def write_problems(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSON lines file; returns its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
