"""The CPU bar of the PPO head: no slower than eager torch with all logits, at 2,048 tokens of the 0.5B head.

    OMP_NUM_THREADS=1 python -m benchmarks.bar [N]

Times are CPU seconds of one thread, which other processes on the machine hardly touch, in turns; the least of two each.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.cases import PPO
from kernels import ppo_head

D, V = 896, 151_936


def main() -> None:
    """Print the seconds of each, and ours as a share of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=int, nargs="?", default=2048, metavar="N", help="action tokens [2048]")
    N = parser.parse_args().tokens
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).requires_grad_(), (0.02 * torch.randn(V, D)).requires_grad_()
    targets, old, advantages = torch.randint(V, (N,)), 0.1 * torch.randn(N) - 12, torch.randn(N)
    known = old, advantages, old

    def ours():
        return ppo_head(hidden, weight, targets, PPO, known)[0]

    def eager():
        logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return PPO(logprobs, *known)[0].sum()

    def products():
        gradient, out, dW = torch.ones(410, V), torch.empty(410, V), torch.empty(V, D)
        start, X, W = time.process_time(), hidden.detach(), weight.detach()
        for first in range(0, N, 410):
            x = X[first : first + 410]
            torch.mm(x, W.T, out=out[: len(x)])
            torch.mm(gradient[: len(x)], W)
            torch.addmm(dW, gradient[: len(x)].T, x, out=dW)
        return time.process_time() - start

    seconds: dict[str, float] = {}
    for _ in range(2):
        seconds["three bare products"] = min(seconds.get("three bare products", 1e9), products())
        for loss in (ours, eager):
            start = time.process_time()
            gradients = torch.autograd.grad(loss(), (hidden, weight))
            seconds[loss.__name__] = min(seconds.get(loss.__name__, 1e9), time.process_time() - start)
            del gradients
    for name, value in seconds.items():
        print(f"{name:20s} {value:6.1f} s   ours / this {seconds['ours'] / value:.2f}")


if __name__ == "__main__":
    main()
