"""The plan of memory: what fits is what free memory divided by a slot says, and what does not is refused by name."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import registry.memory
from agents import ReFT, memory
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.training import Training
from benchmarks.run import main
from envs.task import Task, TaskSpec
from envs.vector import MathReasonVector
from policies import Policy
from registry import UsageError


@pytest.fixture
def small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets how many bytes the system says are free."""
    monkeypatch.setattr(registry.memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(registry.memory, "OWN_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(registry.memory, "CGROUP", tmp_path)

    def say(free: int, limit: str = "max", used: int = 0, cache: int = 0) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {free // 1024} kB\n")
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")

    return say


def test_slots_that_do_not_fit_are_refused_with_the_number_that_does(folder: str, small_machine) -> None:
    target, task = Policy.load(folder, dtype="float32"), Task(TaskSpec())
    optimizer = torch.optim.AdamW(target.parameters())
    one = memory.slot_bytes(target, task)
    shape = target.architecture
    assert one >= shape.layers * shape.kv_width * task.spec.max_new_tokens * 4
    lasting = memory.lasting_bytes(target, optimizer)
    assert lasting == 16 * sum(parameter.numel() for parameter in target.parameters())
    small_machine(lasting + memory.layout_bytes(target) + 20 * one + 2048)
    assert memory.fitting_slots(target, task, optimizer, 256) == 20
    assert memory.fitting_slots(target, task, optimizer, 8) == 8
    few = {"group_size": 4, "problems_per_batch": 2, "microbatch_tokens": 64}
    ReFT(target, MathReasonVector(num_envs=20, copy=False), **few)
    with pytest.raises(UsageError, match=r"256 slots.*slots=20 or fewer.*max_new_tokens"):
        ReFT(target, MathReasonVector(num_envs=256, copy=False), **few)
    small_machine(lasting // 2)
    with pytest.raises(UsageError, match="smaller model"):
        ReFT(target, MathReasonVector(num_envs=2, copy=False), **few)


def test_where_nothing_is_trained_memory_holds_more_slots(folder: str, small_machine) -> None:
    target, task = Policy.load(folder, dtype="float32"), Task(TaskSpec())
    weights = 4 * sum(parameter.numel() for parameter in target.parameters())
    small_machine(weights + memory.layout_bytes(target) + 20 * memory.slot_bytes(target, task) + 2048)
    assert memory.fitting_slots(target, task, None, 256) == 20
    assert memory.fitting_slots(target, task, torch.optim.AdamW(target.parameters()), 256) < 20


def test_bfloat16_weights_are_counted_as_this_processor_multiplies_them(folder: str, monkeypatch) -> None:
    target = Policy.load(folder, dtype="bfloat16")
    optimizer = torch.optim.AdamW(target.parameters())
    weights = sum(parameter.numel() for parameter in target.parameters())
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        monkeypatch.setattr(memory, "product_dtype", lambda *_, dtype=dtype: dtype)
        assert memory.lasting_bytes(target, optimizer) == (size + 12) * weights
        assert memory.layout_bytes(target) == size * max(
            module.weight.numel() for module in target.model.modules() if isinstance(module, torch.nn.Linear)
        )


def test_a_system_that_tells_nothing_stops_nobody(folder: str, small_machine) -> None:
    target = Policy.load(folder, dtype="float32")
    optimizer = torch.optim.AdamW(target.parameters())
    assert memory.fitting_slots(target, Task(TaskSpec()), optimizer, 256) == 256


def plan(target: Policy, task: Task, slots: int, tokens: int) -> int:
    """All that a run with these slots and micro-batches takes beside the model, in whole kB as the system says it."""
    lasting = memory.lasting_bytes(target, torch.optim.AdamW(target.parameters()))
    rollout = slots * memory.slot_bytes(target, task) + memory.layout_bytes(target)
    later = max(rollout, memory.update_bytes(target, tokens))
    return -(-(lasting + later) // 1024) * 1024


def test_slots_that_nobody_named_are_lowered_to_what_fits(folder: str, small_machine) -> None:
    target, task = Policy.load(folder, dtype="float32"), Task(TaskSpec())
    few = {"group_size": 4, "problems_per_batch": 16}
    whole = plan(target, task, 0, task.max_length)
    small_machine(whole)
    lasting = memory.lasting_bytes(target, torch.optim.AdamW(target.parameters())) + memory.layout_bytes(target)
    room = (whole - lasting) // memory.slot_bytes(target, task)
    assert 8 < room < 64
    with pytest.warns(UserWarning, match=f"memory holds {room} slots, not 64"):
        agent = ReFT(folder, "MathReason-v0", microbatch_tokens=64, **few)
    assert agent.n_envs == agent.envs.num_envs == room
    lowered = agent.iterate()
    small_machine(1 << 40)
    assert ReFT(folder, "MathReason-v0", microbatch_tokens=64, **few).iterate()["tokens"] == lowered["tokens"]
    small_machine(whole)
    with pytest.raises(UsageError, match=f"slots={room} or fewer"):
        ReFT(folder, "MathReason-v0", microbatch_tokens=64, slots=64, **few)
    small_machine(whole // 2)
    with pytest.raises(UsageError, match=r"an update of 104 tokens .* gradient_checkpointing=true"):
        ReFT(folder, "MathReason-v0", microbatch_tokens=64, **few)


def test_a_run_lowers_its_slots_with_a_sentence(folder: str, small_machine, tmp_path: Path, capsys) -> None:
    target, task = Policy.load(folder, dtype="float32"), Task(TaskSpec())
    small_machine(plan(target, task, 0, task.max_length))
    settings = ["group_size=4", "problems_per_batch=16", "microbatch_tokens=64", "evaluation.problems=64"]
    settings += ["evaluation.samples=1", "evaluation.every=0", "env.tokenizer=builtin"]
    command = ["--policy", folder, "--iterations", "1", "--quiet", "--runs", str(tmp_path / "runs")]
    assert main([*command, *(word for setting in settings for word in ("--set", setting))]) == 0
    told = capsys.readouterr().err
    assert "slots of rollouts, not 64" in told and "slots of evaluations, not 64" in told


def resident() -> int:
    return psutil.Process().memory_info().rss


@contextmanager
def holes(size: int) -> Iterator[int]:
    """``size`` bytes were taken and freed in pieces that lie between others; gives what was resident before."""
    registry.memory.return_freed()
    before = resident()
    pieces, between = [], []
    for _ in range(size // 2**16):
        pieces.append(torch.ones(2**14))
        between.append(torch.ones(2**8))
    pieces.clear()
    yield before
    between.clear()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is freed")
def test_what_was_freed_goes_back_to_the_system() -> None:
    with holes(100 * 2**20) as before:
        assert resident() - before > 90 * 2**20
        registry.memory.return_freed()
        assert resident() - before < 15 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is freed")
def test_a_run_gives_back_what_was_freed_at_its_checkpoints(tmp_path: Path) -> None:
    settings = {"problems_per_batch": 2, "group_size": 2, "evaluation.problems": 2, "evaluation.samples": 1}
    spec = resolve("reft", settings={**settings, "iterations": 5, "checkpoint_every": 3, "evaluation.every": 0})
    held = {}
    run = iter(Training(spec, tmp_path))
    for row in run:
        if row["iteration"] == 1:
            break
    with holes(300 * 2**20) as before:
        for row in run:
            held[row["iteration"]] = resident() - before
    assert held[3] > 250 * 2**20 and held[4] < 100 * 2**20, held


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is freed")
def test_learning_gives_back_what_was_freed(folder: str) -> None:
    few = {"slots": 4, "group_size": 2, "problems_per_batch": 2, "microbatch_tokens": 64}
    agent = ReFT(folder, "MathReason-v0", **few)
    agent.learn(1)
    with holes(300 * 2**20) as before:
        agent.iterate()
        assert resident() - before > 250 * 2**20
        while agent.iteration < 10:
            agent.learn(1, reset_num_timesteps=True)
        assert resident() - before < 100 * 2**20


MEASURED = """
import json, sys
import gymnasium as gym
from agents import ReFT
def held(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
(policy, dtype), (slots, tokens, vocabulary) = sys.argv[1:3], map(int, sys.argv[3:])
env = gym.make_vec("MathReason-v0", num_envs=slots, copy=False, reward="random", vocab_size=vocabulary)
agent = ReFT(policy, env, group_size=8, problems_per_batch=slots // 8, microbatch_tokens=tokens, dtype=dtype)
start = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
for _ in range(2):
    metrics = agent.iterate()
print(json.dumps([held("VmHWM") - start, metrics["tokens"] + slots // 8 * env.task.spec.max_prompt_tokens]))
"""


def llama(place: Path, **shape: int) -> str:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    return str(place)


def gemma(place: Path) -> str:
    """Gemma 3's vocabulary on next to no layers."""
    sliding = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 32}
    width = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=2**18, **sliding, **heads, **width)).save_pretrained(place)
    return str(place)


SHAPES = {
    "wide vocabulary": {"vocab_size": 2**17, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "deep": {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 16},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "slots", "tokens", "dtype"),
    [
        ("tiny", 64, 1024, "float32"),
        ("tiny", 256, 8192, "float32"),
        ("wide vocabulary", 32, 2048, "float32"),
        ("wide vocabulary", 32, 2048, "bfloat16"),
        ("deep", 64, 4096, "float32"),
        ("gemma", 32, 512, "float32"),
        ("gemma", 64, 512, "bfloat16"),
        pytest.param("135M", 8, 512, "float32", marks=pytest.mark.slow),
        pytest.param("135M", 32, 2048, "float32", marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_near_what_a_run_takes(name: str, slots: int, tokens: int, dtype: str, tmp_path: Path) -> None:
    made = {"tiny": lambda: name, "gemma": lambda: gemma(tmp_path)}
    policy = made.get(name, lambda: llama(tmp_path, **SHAPES[name]))()
    target = Policy.load(policy, dtype=dtype)
    given = [policy, dtype, str(slots), str(tokens), str(target.vocab_size)]
    done = subprocess.run([sys.executable, "-c", MEASURED, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, written = json.loads(done.stdout.splitlines()[-1])
    planned = plan(target, Task(TaskSpec()), slots, min(tokens, int(written)))
    print(f"\n{name}, {slots} slots, {tokens} tokens, {dtype}: ", end="")
    print(f"planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f}")
    assert measured < 1.3 * planned + 50e6  # the interpreter's own, and what the allocator leaves between
    assert planned < 2 * measured + 50e6
    if name == "gemma":
        assert 0.75 * measured < planned < 1.25 * measured


SPLIT = """
import json, sys
import gymnasium as gym
from agents import ReFT
def held(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
policy, slots, vocabulary = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
env = gym.make_vec("MathReason-v0", num_envs=slots, copy=False, reward="random", vocab_size=vocabulary)
agent = ReFT(policy, env, group_size=4, problems_per_batch=2, microbatch_tokens=512, learning_rate=1e-5, shard=True)
start = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
agent.iterate(), agent.iterate()
parameters = list(agent.target.model.parameters())
tensors = {
    "weights": parameters,
    "gradients": [p.grad for p in parameters if p.grad is not None],
    "moments": [value for state in agent.optimizer.state.values() for value in state.values() if value.dim()],
}
said = {name: sum(tensor.nbytes for tensor in those) for name, those in tensors.items()}
print(json.dumps({**said, "resident": held("VmHWM") - start}))
"""


def split_over(size: int, policy: str, vocabulary: int) -> list[dict[str, int]]:
    """Bytes that each of ``size`` processes of one run held, as its tensors and as the system say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if size > 1 else {}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SPLIT, policy, str(8 // size), str(vocabulary)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_split_falls_with_the_number_of_processes_as_planned(tmp_path: Path) -> None:
    """61 M random weights; the parts by their bytes, and resident memory against the plan."""
    shape = {"vocab_size": 8192, "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12}
    policy = llama(tmp_path, **shape)
    target, task = Policy.load(policy, dtype="float32"), Task(TaskSpec())
    whole = memory.ModelSize.of(target)
    del target
    lengths = task.spec.max_prompt_tokens, task.spec.max_new_tokens
    for size in (1, 2, 4):
        planned = memory.plan(replace(whole, processes=size), 8 // size, *lengths, 512)
        for said in split_over(size, policy, shape["vocab_size"]):
            print(f"\n{size} processes: {said}, planned {planned.total - planned.weights} beside the weights", end="")
            for name in ("weights", "gradients", "moments"):
                assert 0 <= said[name] - getattr(planned, name) < 0.001 * 8 * whole.weights, name  # norms are whole
            assert said["resident"] < 1.3 * (planned.total - planned.weights) + 50e6
            assert planned.total - planned.weights < 2 * said["resident"] + 50e6


def test_on_a_gpu_it_is_the_card_s_memory_that_counts(folder: str, monkeypatch) -> None:
    """Slots and micro-batches by what the driver says is free, and what torch keeps without using it."""
    target, task = Policy.load(folder, dtype="float32"), Task(TaskSpec())
    optimizer = torch.optim.AdamW(target.parameters())
    monkeypatch.setattr(Policy, "device", property(lambda self: torch.device("cuda")))
    one, lasting = memory.slot_bytes(target, task), memory.lasting_bytes(target, optimizer)
    needed = lasting + memory.layout_bytes(target) + 20 * one
    for kept in (0, needed // 2):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, kept=kept: (needed - kept, 2 * needed))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, kept=kept: kept + 64)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 64)
        assert memory.fitting_slots(target, task, optimizer, 256) == 20
        with pytest.raises(memory.NotEnoughMemory, match=r"30 slots.*slots=20 or fewer"):
            memory.check_memory(target, task, optimizer, 30)
    room = 4 * memory.update_bytes(target, 16_384)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, room))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 64)
    assert memory.microbatch_budget(None, memory.ModelSize.of(target)) == 16_384
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**50, 2**50))
    assert memory.microbatch_budget(None, memory.ModelSize.of(target)) == memory.MOST_TOKENS
    free = 2 * memory.update_bytes(target, 8_192)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**50))  # others have the card
    assert memory.microbatch_budget(None, memory.ModelSize.of(target)) == 8_192
    assert memory.microbatch_budget(100, memory.ModelSize.of(target)) == 100
    monkeypatch.undo()
    assert memory.microbatch_budget(None, memory.ModelSize.of(target)) == 2_048  # on a CPU more is no faster
