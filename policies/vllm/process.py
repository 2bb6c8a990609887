"""What runs in the process that holds a vLLM engine: requests and replies are lines of JSON, weights are files.

It is started by its path and imports nothing of the project, so that the interpreter may be one whose environment has
vLLM and no more. ``engine.py`` is the other end and says what the lines hold.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

BATCHED = 4096  # tokens of a step, the least of vLLM's defaults
# Its default block, 128 tokens, shares no short prompt. A prompt in chunks takes draws back; a CPU's generator cannot.
ON_CPU = {"block_size": 32, "enable_chunked_prefill": False}
LOWEST = (0, 32)  # reload_weights takes an iterator, and packs again what a CPU's kernels read


def main() -> None:
    """Answer requests until standard input closes, or the process that asks ends; then drop the model's folder."""
    sys.path.pop(0)  # this file's own folder
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that a library prints may mix with the replies
    parent, settings = os.getppid(), json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(parent, settings["folder"]), daemon=True).start()

    def reply(**said: Any) -> None:
        replies.write(json.dumps(said) + "\n")

    llm = _refused(partial(_engine, **settings), reply)
    if llm is not None:
        reply(ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            done = _refused(partial(_load if "weights" in request else _write, llm, **request), reply)
            if done is not None:
                reply(**done)
    _leave(settings["folder"])


def _refused(act: Callable[[], Any], reply: Callable[..., None]) -> Any:
    """What ``act`` gives, or None where it raised, after a reply that says what."""
    try:
        return act()
    except Exception as error:
        import traceback

        traceback.print_exc()
        reply(kind=type(error).__name__, error=str(error) or type(error).__name__)
        return None


def _end_with(parent: int, folder: str) -> None:
    """Leave as soon as the process that asks is gone, in the middle of a request, too."""
    while os.getppid() == parent:
        time.sleep(1.0)
    _leave(folder)


def _leave(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # vLLM's own end takes seconds, and has nothing left to save


def _engine(folder: str, dtype: str, longest: int, slots: int, cache_bytes: int, quantization: str) -> Any:
    """A vLLM engine of the model in ``folder``, with a cache of ``cache_bytes`` for ``slots`` sequences at a time."""
    import vllm
    from vllm.platforms import current_platform

    if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < LOWEST:
        raise ImportError(f"vLLM is {vllm.__version__}")
    on_cpu = current_platform.is_cpu()
    return vllm.LLM(
        model=folder,
        skip_tokenizer_init=True,
        generation_config="vllm",  # none but what a request says
        dtype=dtype,
        max_model_len=longest,
        max_num_seqs=slots,
        kv_cache_memory_bytes=cache_bytes,
        gpu_memory_utilization=0.02,  # only its check at the start reads it, the cache's size being given
        quantization=quantization or None,
        logprobs_mode="processed_logprobs",  # of the distribution that a token is drawn from, the temperature's
        enable_prefix_caching=True,
        enforce_eager=on_cpu,
        **({"max_num_batched_tokens": max(slots, longest)} if slots > BATCHED else {}),
        **(ON_CPU if on_cpu else {}),
    )


def _load(llm: Any, weights: str) -> dict[str, Any]:
    """Put the file's tensors in the place of the engine's."""
    from safetensors import safe_open

    def pairs() -> Iterator[tuple[str, Any]]:
        with safe_open(weights, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)

    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs()})
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache of the old weights cannot be emptied")
    return {"loaded": True}


def _write(
    llm: Any,
    prompts: list[list[int]],
    completions: list[tuple[int, int]],
    temperature: float,
    max_tokens: int,
    stop_token_ids: list[int],
) -> dict[str, Any]:
    """A completion of a prompt for each (number of the prompt, seed): its tokens and their log-probabilities."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": prompts[n]} for n, _ in completions]
    sampling = [
        SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=True,  # what ends a completion the environment says
            logprobs=0,
            detokenize=False,
        )
        for _, seed in completions
    ]
    outputs = [one.outputs[0] for one in llm.generate(asked, sampling, use_tqdm=False)]
    tokens = [list(one.token_ids) for one in outputs]
    logp = [[at[t].logprob for t, at in zip(one.token_ids, one.logprobs, strict=True)] for one in outputs]
    return {"tokens": tokens, "logp": logp}


if __name__ == "__main__":
    main()
