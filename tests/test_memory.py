"""The memory and work model against what torch allocates, and against the token tree itself."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import train_rlpa
from benchmarks import scaling_table
from benchmarks.memory_peak import grow_tree, measured_step
from benchmarks.scaling_table import row_work, traffic, tree_blocks
from config import Config, flag
from dry_run import memory
from dry_run.memory import Plan, advice, peak, phases, tree_work
from dry_run.plan import dry_run
from learners.learner import make_learner
from model import Critic, KVCache, Qwen2Config, Qwen2ForCausalLM, ValueHead, random_policy

pytestmark = pytest.mark.slow

ppo_head = sys.modules["kernels.ppo_head"]  # the package's name for it is the function
SHARED = Path(__file__).parents[1].parent / "shared"
WORKSPACE = 16 << 20
LONG = (50, [30] * 6, [54] * 6, 4)  # system, user, reply, n: 1,526 tokens
MIDDLE, SHORT = (40, [20] * 4, [30] * 4, 4), (20, [10] * 2, [10] * 2, 4)  # 600 and 120


def make_config(D: int, I: int, L: int, H: int, tied: bool = True) -> Qwen2Config:  # noqa: E741
    """Make a config with V = 20,000 and two KV heads."""
    return Qwen2Config(20_000, D, I, L, H, 2, tie_word_embeddings=tied)


def extra_of(config: Qwen2Config, plan: Plan) -> tuple[str, float]:
    """The planned peak beside what is always there: the name of its phase, and bytes."""
    name, bytes_ = peak(config, plan)
    return name, bytes_ - sum(plan.resident(config).values())


MODEL, WIDE, SMALL = make_config(384, 1536, 4, 6), make_config(512, 1024, 2, 8), make_config(256, 512, 3, 4)
UNTIED = make_config(512, 1024, 2, 8, tied=False)


@pytest.mark.parametrize(
    ("config", "shape", "micro", "checkpointing", "dtype", "shared"),
    [
        (MODEL, LONG, 1, False, torch.float32, False),  # activations rule
        (MODEL, MIDDLE, 2, False, torch.float32, False),
        (make_config(640, 2560, 3, 10), MIDDLE, 1, False, torch.float32, False),
        (MODEL, MIDDLE, 1, True, torch.float32, False),
        (make_config(256, 1024, 4, 4), MIDDLE, 2, True, torch.float32, False),
        (WIDE, SHORT, 1, False, torch.float32, False),  # gradients rule
        (WIDE, SHORT, 2, False, torch.float32, False),
        (UNTIED, SHORT, 2, False, torch.float32, False),
        (MODEL, MIDDLE, 1, False, torch.float32, True),
        (WIDE, SHORT, 2, False, torch.float32, True),
        (SMALL, MIDDLE, 1, False, torch.bfloat16, False),
        (WIDE, SHORT, 1, False, torch.bfloat16, False),
        (WIDE, SHORT, 2, False, torch.bfloat16, False),
        (UNTIED, SHORT, 1, False, torch.bfloat16, False),
        (SMALL, MIDDLE, 1, False, torch.bfloat16, True),
        (SMALL, MIDDLE, 2, True, torch.bfloat16, True),
    ],
)
def test_peak_of_an_update(monkeypatch, config, shape, micro, checkpointing, dtype, shared):
    """Guards a model that forgets a saved tensor, a gradient or the head's workspace.

    Weights and moments, which nobody miscounts, are left out of the comparison: they would hide errors.
    """
    monkeypatch.setitem(ppo_head.WORKSPACE, "cpu", WORKSPACE)
    measured, plan = measured_step(config, shape, micro, checkpointing, dtype, shared)
    name, predicted = extra_of(config, plan)
    assert predicted == pytest.approx(measured, rel=0.03 if dtype == torch.float32 else 0.06), name


@pytest.mark.parametrize(
    ("config", "shape", "micro", "checkpointing", "dtype", "shared"),
    [
        (MODEL, LONG, 1, False, torch.float32, False),
        (MODEL, MIDDLE, 2, True, torch.float32, False),
        (UNTIED, MIDDLE, 2, False, torch.float32, True),
        (SMALL, MIDDLE, 1, False, torch.bfloat16, False),
        (WIDE, SHORT, 2, False, torch.bfloat16, False),
        (SMALL, MIDDLE, 2, True, torch.bfloat16, True),
    ],
)
def test_peak_of_an_update_of_adapters(monkeypatch, config, shape, micro, checkpointing, dtype, shared):
    """Guards a plan that counts gradients of a frozen base or head, or forgets what adapters keep."""
    monkeypatch.setitem(ppo_head.WORKSPACE, "cpu", WORKSPACE)
    measured, plan = measured_step(config, shape, micro, checkpointing, dtype, shared, rank=16)
    name, predicted = extra_of(config, plan)
    assert predicted == pytest.approx(measured, rel=0.06), name
    assert predicted < peak(config, dataclasses.replace(plan, lora_rank=0))[1] / 1.5


def test_resident_bytes():
    """Guards the bytes of weights and moments, against a real optimizer's."""
    config = make_config(64, 128, 2, 2)
    policy = random_policy(config, 0)
    models = policy, Critic.from_policy(policy)
    resident = Plan(reference=True).resident(config)
    weights = [sum(p.nbytes for p in model.parameters()) for model in models]
    assert [resident["policy"], resident["critic"]] == weights and resident["reference"] == weights[0]
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    moments = [m for o in optimizers for state in o.state.values() for m in state.values() if m.dim()]
    assert resident["optimizer"] == sum(m.nbytes for m in moments)


def test_resident_bytes_in_bf16():
    """Guards the master's copy, a shared critic's few bytes, and moments in fp32."""
    config, settings = make_config(64, 128, 2, 2), Config(ckpt="x")
    policy = random_policy(config, 0)
    learners = [
        make_learner(m, 1e-3, settings, torch.bfloat16) for m in (policy, ValueHead.from_policy(policy))
    ]
    resident = Plan(compute_bytes=2, separate_critic=False).resident(config)
    for name, learner in zip(("policy", "critic"), learners, strict=True):
        held = [*learner.model.parameters(), *learner.masters.values()]
        assert resident[name] == sum(x.nbytes for x in held)
        train_rlpa.optimizer_step(learner, 1.0, 1.0)
    moments = [m for x in learners for state in x.optimizer.state.values() for m in state.values() if m.dim()]
    assert resident["optimizer"] == sum(m.nbytes for m in moments)


def test_one_shard_holds_everything():
    """Guards a part that is divided though every process holds it, or held though it is shared out."""
    config = make_config(64, 128, 2, 2)
    for dtype in (4, 2):
        whole, one, four = (Plan(compute_bytes=dtype, shards=n).resident(config) for n in (0, 1, 4))
        assert one["policy"] + one["replica"] * (dtype == 2) == whole["policy"]  # in fp32 the weights sample themselves
        assert one["optimizer"] == whole["optimizer"] == 4 * four["optimizer"]
        assert one["policy"] == 4 * four["policy"] and one["critic"] == 4 * four["critic"]
        assert one["replica"] == four["replica"] > 0
        root = dtype * memory.root_parameters(config, head=True)
        assert one["reference"] - root == whole["reference"] == 4 * (four["reference"] - root)


def test_a_sharded_base_is_whole_in_a_rollout():
    """Guards a base of adapters that a dry run cuts for ever: it samples whole, and is cut in the update."""
    config, plan = make_config(64, 128, 2, 2), Plan(tokens=100, actions=10, cache_tokens=10, lora_rank=4)
    whole, two = phases(config, plan), phases(config, dataclasses.replace(plan, shards=2))
    assert sum(two["rollout"].values()) == sum(whole["rollout"].values())
    cut, layers = two["optimizer's step"], 2 * memory.layer_parameters(config)
    assert whole["optimizer's step"]["policy"] - cut["policy"] == 4 * layers / 2
    assert cut["gathered"] == 4 * 64 * 128 and cut["reference"] == 0


def test_more_processes_hold_less_of_shards():
    """Guards a sign, and whole models whose need depends on the number of processes."""
    config, plan = make_config(256, 1024, 8, 4), Plan(tokens=400, actions=300, cache_tokens=80, compute_bytes=2)
    peaks = [peak(config, dataclasses.replace(plan, shards=n))[1] for n in (2, 4, 8)]
    assert peaks[0] > peaks[1] > peaks[2] and peaks[0] < peak(config, plan)[1]
    for shards in (0, 8):
        moved = traffic(config, dataclasses.replace(plan, shards=shards), 8, 4, 2)
        assert traffic(config, dataclasses.replace(plan, shards=shards), 1, 4, 2) == (0, 0, 0)
        assert moved.update > 0 and (moved.refresh > 0) == (moved.statistics > 0) == bool(shards)


def test_traffic_of_one_step():
    """Guards a forgotten pass: gradients of whole models go round twice; shards gather twice, but for the root."""
    config = make_config(64, 128, 2, 2, tied=False)
    policy, root = memory.policy_parameters(config), memory.root_parameters(config, head=True)
    plan = Plan(compute_bytes=2, separate_critic=False, reference=False)
    assert traffic(config, plan, 2, 1, 1).update == 4 * (policy + 64)
    assert traffic(config, dataclasses.replace(plan, shards=2), 2, 1, 1) == (
        policy, (2 * (2 * policy - root) + 4 * policy) / 2, policy
    )  # fmt: skip


def test_scaling_table(tmp_path):
    """Guards the table of docs/scaling.md, which shows what the program counts now, and the shapes that it is for."""
    doc = Path(memory.__file__).parents[1] / "docs" / "scaling.md"
    assert scaling_table.scaling_table() in doc.read_text()
    for size, shape in scaling_table.QWEN.items():
        path = SHARED / "qwen2.5" / f"config-{size}-Instruct.json"
        if path.is_file():
            given = Qwen2Config.from_file(path)
            assert dataclasses.replace(shape, bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id) == given
    (tmp_path / "config.json").write_text(json.dumps(scaling_table.QWEN["7B"].to_dict()))
    config = Config(
        ckpt=str(tmp_path), dry_run="8x80", shard=True, checkpointing=True, max_user_tokens=64, max_new_tokens=320
    )
    assert "fits 80.0 GB" in dry_run(config)
    assert "does not fit 80.0 GB" in dry_run(dataclasses.replace(config, dry_run="1x80"))
    assert "does not fit 80.0 GB" in dry_run(dataclasses.replace(config, shard=False))


def test_kv_cache_exactly():
    """Guards a forgotten factor: keys and values, layers, KV heads."""
    config = make_config(64, 128, 3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(config, 5, 17, dtype)
        assert memory.kv_bytes(config, 5, 17, dtype.itemsize) == sum(x.nbytes for x in cache.keys + cache.values)


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B", "7B"])
def test_parameters_of_qwen(size):
    """Guards the parameter count at the real shapes, against the modules built without memory."""
    path = SHARED / "qwen2.5" / f"config-{size}-Instruct.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    config = Qwen2Config.from_file(path)
    with torch.device("meta"):
        models = Qwen2ForCausalLM(config), Critic(config)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [memory.policy_parameters(config), Plan().critic_parameters(config)]
    with torch.device("meta"):
        llama = Qwen2ForCausalLM(config := dataclasses.replace(config, model_type="llama"))
    assert sum(p.numel() for p in llama.parameters()) == memory.policy_parameters(config)


def test_work_is_that_of_the_tree():
    """Guards the closed forms against a real token tree: nodes, actions, and ancestors of all nodes."""
    shape = (12, [5, 7, 3], [11, 4, 9], 3)
    tree, actions = grow_tree(*shape)
    work = tree_work(*shape)
    assert (work.trained, work.decoded) == (len(tree), len(actions))
    assert work.train_pairs == sum(position + 1 for position in tree.positions)
    assert tree_blocks(*shape) == tuple(tree.layout().blocks)


def test_rows_of_the_published_procedure():
    """Guards the per-turn rows: lengths and causal pairs written out, with older replies cut to their response."""
    work = row_work(10, [5, 5, 5], [20, 30, 40], n=2, kept=[8, 9, 9])
    prompts, rows = (15, 40, 63), (35, 70, 103)  # 10+5; 15+20+5; 10+15+8+30
    assert work.prefilled == 2 * sum(prompts) and work.trained == 2 * sum(rows)
    assert work.train_pairs == 2 * sum(length * (length + 1) // 2 for length in rows)


def test_one_candidate_and_one_turn_save_nothing_but_the_seam():
    """Guards an advantage that is claimed where there is none."""
    assert tree_work(10, [5], [20], 1)[:3] == row_work(10, [5], [20], 1)[:3]


def test_advice_names_what_can_be_changed():
    """Guards a message that sends the user to a flag that cannot help."""
    config = make_config(64, 128, 2, 2)
    resident = sum(Plan().resident(config).values())
    roomy = Plan(tokens=100, actions=10, cache_tokens=10, workspace=1 << 20)
    assert advice(config, roomy, 80e9).startswith("fits 80.0 GB")
    wide = dataclasses.replace(roomy, cache_tokens=10**8)
    assert "--decode-batch-size" in advice(config, wide, 1e9)
    long = dataclasses.replace(roomy, tokens=10**6)
    assert "--microbatch-tokens" in advice(config, long, 1e9)
    assert "does not fit" in advice(config, roomy, resident / 2)
    assert "--microbatch-tokens" not in advice(config, long, resident / 2)


def test_smaller_settings_need_less():
    """Guards a sign: each switch that saves memory does."""
    config, plan = make_config(256, 1024, 8, 4), Plan(tokens=4000, actions=3000, cache_tokens=800)
    full = peak(config, plan)[1]
    for saving in (
        dict(separate_critic=False), dict(reference=False), dict(checkpointing=True), dict(compute_bytes=2, fused=True),
        dict(tokens=2000, actions=1500), dict(several_microbatches=False),
    ):  # fmt: skip
        assert peak(config, dataclasses.replace(plan, **saving))[1] < full, saving


def test_advice_names_flags_that_exist():
    """Guards advice that cannot be taken: whatever part is the largest, each flag named is the trainer's."""
    parts = set().union(*phases(make_config(64, 128, 2, 2), Plan()).values())
    plans = [Plan(separate_critic=s, checkpointing=c) for s in (True, False) for c in (True, False)]
    told = {part: " ".join(memory.remedy(part, plan) for plan in plans) for part in parts}
    flags = {flag(f.name) for f in dataclasses.fields(Config)}
    for part, text in told.items():
        named = set(re.findall(r"--[a-z-]+", text))
        assert named and named <= flags, (part, named - flags)


def test_report_of_qwen_3b(tmp_path, capsys):
    """Guards the figures of docs/performance.md: 3B fits one card as the issue says, and the table is aligned.

    The issue's two cards: a critic on the policy's trunk on 80 GB, one with its own on 141 GB; AdamW in fp32.
    """
    path = SHARED / "qwen2.5" / "config-3B-Instruct.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    (tmp_path / "config.json").write_text(path.read_text())
    reports = {}
    with capsys.disabled():
        for critic, gb in (("separate", 141), ("shared", 80), ("separate", 80)):
            config = Config(
                ckpt=str(tmp_path), critic=critic, dry_run=str(gb), checkpointing=True, max_user_tokens=64,
                max_new_tokens=320,
            )  # fmt: skip
            reports[critic, gb] = text = dry_run(config)
            print(f"\n--critic {critic} --dry-run {gb}\n{text}")
            table = text.splitlines()[: text.splitlines().index(next(x for x in text.splitlines() if "fit" in x))]
            assert len({len(line) for line in table}) == 1
    assert "does not fit" not in reports["separate", 141] + reports["shared", 80]
    assert "does not fit" in reports["separate", 80] and "--critic shared" in reports["separate", 80]


def test_examples():
    """Guards the examples of the docstrings."""
    assert doctest.testmod(memory).failed == doctest.testmod(scaling_table).failed == 0
