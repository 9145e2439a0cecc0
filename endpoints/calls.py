"""What the calls of a run amount to: requests, tokens and costs, under the names of metrics.jsonl."""

from __future__ import annotations

from config import Config

ENDPOINTS = ("simulator_", "judge_", "subject_")


def cost(calls: dict[str, float], config: Config) -> dict[str, float]:
    """Return {"cost_dollars": …}, what the calls cost or, replayed, would have; {} without prices.

    The embedded user costs nothing.
    """
    paid = ["judge", "subject"] + ["simulator"] * bool(config.simulator_url)
    tokens = [sum(calls.get(f"{name}_{side}_tokens", 0) for name in paid) for side in ("prompt", "completion")]
    if not (config.price_in or config.price_out):
        return {}
    return {"cost_dollars": (tokens[0] * config.price_in + tokens[1] * config.price_out) / 1e6}


def calls_note(calls: dict[str, float], config: Config) -> str:
    """Write calls, tokens and costs in one line, "none" where there were no calls and no prices.

    >>> calls = {"judge_requests": 1000, "judge_prompt_tokens": 200000, "judge_completion_tokens": 30000}
    >>> calls_note(calls, Config(price_in=1.0, price_out=4.0))
    'judge 1,000 calls, 200,000 + 30,000 tokens; 0.32 dollars'
    """
    parts = []
    for name in ("simulator", "judge", "subject"):
        n, prompt, said, estimated = (
            int(calls.get(f"{name}_{what}", 0))
            for what in ("requests", "prompt_tokens", "completion_tokens", "without_usage")
        )
        words = f" (no usage from {estimated:,} calls: words are counted)" if estimated else ""
        parts += [f"{name} {n:,} calls, {prompt:,} + {said:,} tokens{words}"] if n else []
    parts += [f"{dollars:.2f} dollars" for dollars in cost(calls, config).values()]
    return ("; ".join(parts) or "none") + (" (replayed: nothing was asked)" if config.replay else "")
