"""The published procedure, written straightforwardly on `transformers`: what our iteration is measured against.

Every turn: one HTTP request after another to the user; `generate` over each dialogue's whole history, once per
candidate. Then every candidate is a row with its whole history, for old and reference log-probs, values and the PPO
update, from full logits. Prompts, rewards and hyper-parameters are ours, and so are whole dialogues before the update.

So that both do the same work, `generate` is made to draw what our rollout drew: a logits processor leaves one id per
row and step. It costs two passes over logits of (rows, V), below a hundredth of a step.

Kinder than the published code: rows of about one length are batched, right-padded rows go without a mask (causal
attention hides what is behind), and logits are computed for sampled ids only in `generate`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LogitsProcessor

import train_rlpa
from config import Config
from dialogue import Dialogue, Turn, open_turn
from learners.learner import make_learner
from records.state import State
from rewards import read_candidate, score_candidate
from simulator import Said, heard, next_message


@dataclass
class Sample:
    """One candidate with its whole history: a row of the published procedure."""

    token_ids: list[int]  # history and sampled ids
    first: int  # place of the first sampled id
    minibatch: int
    reward: float = 0.0  # of the turn
    old_logprobs: Tensor | None = None  # (N,), as all that follow, of the sampled ids
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def sampled(self) -> int:
        """Count the sampled ids."""
        return len(self.token_ids) - self.first


def samples_of(dialogue: Dialogue, config: Config) -> list[Sample]:
    """Return one row per turn and candidate."""
    minibatch = dialogue.index % config.rollout_batch_size // config.minibatch_size
    return [
        Sample(turn.prompt_ids + c.token_ids, len(turn.prompt_ids), minibatch, c.reward)
        for turn in dialogue.turns
        for c in turn.candidates
    ]


def microbatches(samples: list[Sample], most_tokens: int) -> list[list[Sample]]:
    """Sort rows by length, and fill batches until rows times the longest would pass most_tokens."""
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: -len(s.token_ids)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].token_ids) > most_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def right_padded(batch: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Return token_ids (B, T), and row and column (N,) of the token before each sampled id, which predicts it."""
    T = max(len(s.token_ids) for s in batch)
    token_ids = torch.tensor([s.token_ids + [0] * (T - len(s.token_ids)) for s in batch])
    rows = torch.cat([torch.full((s.sampled,), b) for b, s in enumerate(batch)])
    columns = torch.cat([torch.arange(s.first - 1, len(s.token_ids) - 1) for s in batch])
    return token_ids, rows, columns


def gathered(batch: list[Sample], name: str) -> Tensor:
    """Concatenate one field of a batch to (N,)."""
    return torch.cat([getattr(s, name) for s in batch])


def value_loss(values: Tensor, batch: list[Sample], clip: float) -> Tensor:
    """Return the summed clipped value loss of sampled ids."""
    old, returns = gathered(batch, "values"), gathered(batch, "returns")
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum()


class Replay(LogitsProcessor):
    """Leave one id per row and step: the one that another sampler drew."""

    def __init__(self, drawn: list[list[int]], prompt_length: int, pad: int):
        longest = max(map(len, drawn))
        self.drawn = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in drawn])  # (R, longest)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        return torch.full_like(scores, -torch.inf).scatter_(1, self.drawn[:, step, None], 0.0)


class Published:
    """Policy, reference and critic of `transformers` with the weights ours start from, and one iteration with them."""

    def __init__(self, state: State, generate_rows: int = 128, most_tokens: int = 8192):
        """Load a state's models anew; `generate_rows` are sampled at a time, `most_tokens` fill a micro-batch."""
        self.config, self.chat, self.env = state.config, state.chat, state.env
        self.generate_rows, self.most_tokens = generate_rows, most_tokens
        load = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        self.policy = AutoModelForCausalLM.from_pretrained(state.config.ckpt, **load)
        self.ref_policy = AutoModelForCausalLM.from_pretrained(state.config.ckpt, **load).requires_grad_(False)
        self.critic = AutoModel.from_pretrained(state.config.ckpt, **load)
        self.critic.value_head = nn.Linear(self.critic.config.hidden_size, 1, bias=False)
        self.critic.value_head.weight = nn.Parameter(state.critic.model.value_head.weight.detach().clone())
        rates = (self.policy, self.config.lr), (self.critic, self.config.critic_lr)
        self.learners = [make_learner(model, lr, self.config) for model, lr in rates]
        self.seconds: dict[str, float] = defaultdict(float)

    def run_iteration(self, recorded: list[Dialogue]) -> tuple[dict[str, float], list[Dialogue]]:
        """Play the dialogues that ours played and train on them; return figures to compare, and the dialogues."""
        start = time.perf_counter()
        played = self.rollout(recorded)
        clock = time.perf_counter()
        samples = [s for d in played for s in samples_of(d, self.config)]
        self.add_statistics(samples)
        self.add_advantages(samples)
        self.seconds["statistics"] += time.perf_counter() - clock
        clock = time.perf_counter()
        figures = self.update(samples)
        self.seconds["update"] += time.perf_counter() - clock
        figures["seconds"] = time.perf_counter() - start
        figures["tokens"] = sum(len(s.token_ids) for s in samples)
        figures["action_tokens"] = sum(s.sampled for s in samples)
        figures["kl_ref"] = (gathered(samples, "old_logprobs") - gathered(samples, "ref_logprobs")).mean().item()
        figures["value_mean"] = gathered(samples, "values").mean().item()
        return figures, played

    def rollout(self, recorded: list[Dialogue]) -> list[Dialogue]:
        """Play turn by turn: all users, then all candidates, then all rewards."""
        play = train_rlpa.Play(self.config.num_candidates, self.config.temperature, (self.config.seed, "train", 0))
        played = [Dialogue(d.index, d.persona_id, d.persona_facts) for d in recorded]
        for t in range(self.config.max_turns):
            clock = time.perf_counter()
            for dialogue in played:
                said = self.user_message(dialogue, play)
                open_turn(dialogue, said, self.chat, told=said.told)
            self.seconds["waiting"] += time.perf_counter() - clock
            clock = time.perf_counter()
            drawn = self.sample([d.turns[-1].prompt_ids for d in played], [d.turns[t] for d in recorded])
            self.seconds["sampling"] += time.perf_counter() - clock
            clock = time.perf_counter()
            for dialogue, token_ids in zip(played, drawn, strict=True):
                self.score(dialogue, token_ids)
            self.seconds["rewards"] += time.perf_counter() - clock
        return played

    def score(self, dialogue: Dialogue, drawn: list[list[int]]) -> None:
        """Score the candidates that were drawn for a turn, and choose the best."""
        judge, candidates = self.env.judge_with(0), []
        for ids in drawn:
            reason = "stop" if ids[-1] == self.chat.im_end else "length"
            candidates.append(read_candidate(ids, [0.0] * len(ids), reason, dialogue, self.chat))
            score_candidate(candidates[-1], dialogue, self.config, judge)
        rewards = [candidate.reward for candidate in candidates]
        dialogue.turns[-1].candidates, dialogue.turns[-1].chosen = candidates, rewards.index(max(rewards))

    def user_message(self, dialogue: Dialogue, play: train_rlpa.Play) -> Said:
        """Ask the user for the next message of one dialogue, and wait for it."""
        if not dialogue.turns:
            return heard(self.config.first_user_message, dialogue)
        reply = next_message(dialogue, play.stream, self.config, self.env)
        if isinstance(reply, Exception):
            raise reply
        return reply

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], recorded: list[Turn]) -> list[list[list[int]]]:
        """Sample each prompt's candidates, `generate_rows` at a time, from whole prompts; returns their ids."""
        waiting = [(p, candidate.token_ids) for p, turn in enumerate(recorded) for candidate in turn.candidates]
        drawn: list[list[list[int]]] = [[] for _ in prompts]
        for start in range(0, len(waiting), self.generate_rows):
            group = waiting[start : start + self.generate_rows]
            T = max(len(prompts[p]) for p, _ in group)
            padding = [T - len(prompts[p]) for p, _ in group]
            rows = [[self.chat.pad] * n + prompts[p] for n, (p, _) in zip(padding, group, strict=True)]
            outputs = self.policy.generate(
                input_ids=torch.tensor(rows),
                attention_mask=(torch.arange(T) >= torch.tensor(padding)[:, None]).long(),
                do_sample=True,
                temperature=self.config.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.config.max_new_tokens,
                eos_token_id=self.chat.im_end,
                pad_token_id=self.chat.pad,
                logits_processor=[Replay([ids for _, ids in group], T, self.chat.pad)],
                cache_implementation="static",  # here the faster: the dynamic one is copied whole in every step
            )[:, T:].tolist()
            for (p, _), ids in zip(group, outputs, strict=True):
                drawn[p].append(ids[: ids.index(self.chat.im_end) + 1] if self.chat.im_end in ids else ids)
        return drawn

    def logprobs(self, model: nn.Module, batch: list[Sample]) -> Tensor:
        """Return log-probs (N,) of sampled ids, from full logits."""
        token_ids, rows, columns = right_padded(batch)
        logprobs = F.log_softmax(model(input_ids=token_ids, use_cache=False).logits / self.config.temperature, -1)
        return logprobs[rows, columns, token_ids[rows, columns + 1]]

    def critic_values(self, batch: list[Sample]) -> Tensor:
        """Return the critic's values (N,) before each sampled id."""
        token_ids, rows, columns = right_padded(batch)
        hidden = self.critic(input_ids=token_ids, use_cache=False).last_hidden_state
        return self.critic.value_head(hidden)[rows, columns, 0]

    @torch.no_grad()
    def add_statistics(self, samples: list[Sample]) -> None:
        """Compute old and reference log-probs and values."""
        for batch in microbatches(samples, self.most_tokens):
            found = {
                "old_logprobs": self.logprobs(self.policy, batch),
                "ref_logprobs": self.logprobs(self.ref_policy, batch),
                "values": self.critic_values(batch),
            }
            for name, values in found.items():
                for sample, part in zip(batch, values.split([s.sampled for s in batch]), strict=True):
                    setattr(sample, name, part)

    def add_advantages(self, samples: list[Sample]) -> None:
        """Estimate advantages within each turn, its reward on the last token, and whiten them."""
        config = self.config
        for s in samples:
            token_rewards = (-config.kl_coef * (s.old_logprobs - s.ref_logprobs)).tolist()
            token_rewards[-1] += s.reward
            found = train_rlpa.gae(token_rewards, s.values.tolist(), 0.0, 0.0, config.gamma, config.gae_lambda)
            s.advantages = torch.tensor(found)
            s.returns = s.advantages + s.values
        everything = gathered(samples, "advantages")
        for s in samples:
            s.advantages = (s.advantages - everything.mean()) / (everything.std(correction=0) + 1e-8)

    def update(self, samples: list[Sample]) -> dict[str, float]:
        """Take one optimizer step per mini-batch; return the losses per sampled id."""
        steps = self.config.rollout_batch_size // self.config.minibatch_size
        sums = {"policy_loss": 0.0, "value_loss": 0.0}
        for m in range(steps):
            minibatch = [s for s in samples if s.minibatch == m]
            count = sum(s.sampled for s in minibatch)
            for learner in self.learners:
                learner.optimizer.zero_grad()
            for batch in microbatches(minibatch, self.most_tokens):
                ratio = (self.logprobs(self.policy, batch) - gathered(batch, "old_logprobs")).exp()
                clipped = ratio.clamp(1 - self.config.clip_eps, 1 + self.config.clip_eps)
                advantages = gathered(batch, "advantages")
                loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
                (loss / count).backward()
                vf_loss = value_loss(self.critic_values(batch), batch, self.config.value_clip)
                (vf_loss / count).backward()
                sums["policy_loss"] += loss.item()
                sums["value_loss"] += vf_loss.item()
            for learner in self.learners:
                share = train_rlpa.lr_share(m, steps, self.config)
                train_rlpa.optimizer_step(learner, share, self.config.max_grad_norm)
        return {name: value / sum(s.sampled for s in samples) for name, value in sums.items()}
