"""A policy behind an OpenAI-compatible server, in the text-level environment.

    python examples/ask_server.py http://localhost:8000/v1 --model NAME --problems gsm8k

This is the whole loop, for one that asks, retries or prompts in its own way; ``python -m benchmarks.evaluate --server``
does the same with intervals, many requests at a time, and goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request

import gymnasium as gym

import envs  # noqa: F401 (registers the ids)
from registry import UsageError


def ask(server: str, model: str, message: str, max_tokens: int) -> str:
    """The server's answer to one message, greedily."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": message}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    request = urllib.request.Request(f"{server}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.loads(reply.read())["choices"][0]["message"]["content"] or ""


def main(argv: list[str] | None = None) -> float:
    """Ask, judge and count; returns the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="its address, such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--problems", default="arithmetic")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=1024)
    args = parser.parse_args(argv)
    if not args.server.startswith(("http://", "https://")):
        parser.error(f"server {args.server!r}: give its address from http:// on")
    options = {"problems": args.problems, "split": args.split, "problem_options": {"limit": args.limit}}
    env = gym.make("TextMathReason-v0", template="chat", **options)
    size = env.unwrapped.problems.size  # the limit, or all where there are fewer
    total = 0.0
    for index in range(size):
        message, _ = env.reset(options={"problem_index": index})
        _, reward, _, _, info = env.step(ask(args.server, args.model, message, args.max_tokens))
        total += float(reward)
        print(f"{index}: {info['status']} ({info['extracted']}), accuracy so far {total / (index + 1):.1%}", flush=True)
    return total / size


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:  # bad input, no such model, no such server
        sys.exit(f"error: {error}")
