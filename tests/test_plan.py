"""plan.py and gpus.py: memory, bytes and seconds by hand and against torch; the command, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from experiments import plan as command
from experiments import plan_figure
from minir1 import plan
from minir1.gpus import GIB, GPU, GPUS, collective_seconds, exchange_seconds, gpu
from minir1.memory import numbers_of_units, peak, step_memory
from minir1.model.config import ModelConfig, dense
from minir1.model.count import forward_flops, matrix_flops
from minir1.model.hf_config import to_hf_config
from minir1.model.presets import PRESETS
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.plan import Job, memory_parts, seconds, traffic

GQA = dense(vocab=64, dim=32, layers=3, heads=4, ffn=64, qkv_bias=False)
LATENT = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 16}
MOE = ModelConfig(vocab=64, dim=32, layers=3, heads=2, **LATENT, ffn=64, experts=8, expert_ffn=16)
DEVICE = GPU(GIB, 1e12, 1e9, 1e8, 1e7, "made up", node=4)
JOB = Job(GQA, DEVICE, rows=32, answers=4, prompt=8, completion=24, microbatch=256)


# ---- the machine ---------------------------------------------------------------------------------


def test_collectives_by_hand():
    assert collective_seconds(DEVICE, 1, 1e8) == 0
    assert collective_seconds(DEVICE, 4, 1e8) == pytest.approx(0.75)
    # two nodes: half of the bytes enter a node through its four adapters of 1e7
    assert collective_seconds(DEVICE, 8, 1e8) == pytest.approx(0.5 * 1e8 / 4e7)
    fast = replace(DEVICE, network=1e9)
    assert collective_seconds(fast, 8, 1e8) == pytest.approx(7 / 8)  # now the links inside are slower
    assert exchange_seconds(DEVICE, 1, 1e8) == 0
    assert exchange_seconds(DEVICE, 2, 1e8) == pytest.approx(0.5)
    assert exchange_seconds(DEVICE, 8, 1e8) == pytest.approx(0.5 * 1e8 / 1e7)  # half goes to the other node


def test_the_gpus_are_ordered_as_their_generations_are():
    with pytest.raises(ValueError, match="gpu = 'h1000': one of b200, h200, h100"):
        gpu("h1000")
    assert GPUS["h800"] == replace(GPUS["h100"], link=200e9, source=GPUS["h800"].source)
    assert GPUS["b200"].flops > GPUS["h200"].flops == GPUS["h100"].flops > GPUS["a100-80"].flops
    assert all(one.source and one.link >= one.network for one in GPUS.values())


# ---- memory --------------------------------------------------------------------------------------


def test_one_gpu_is_the_preflight_of_the_training_scripts():
    parts = memory_parts(JOB)
    expected = step_memory(JOB.model, microbatch=256, rows=32, length=32, reference=True)
    assert parts == expected and parts["copy"] == parts["gathered"] == plan.host_bytes(JOB) == 0


def test_several_gpus_are_the_preflight_of_as_many_ranks(ranks):
    model = sharded(GQA, ranks)
    expected = step_memory(model, microbatch=256, rows=32, length=32, reference=True, recompute=True)
    assert memory_parts(replace(JOB, gpus=ranks, recompute=True)) == expected


@pytest.fixture
def ranks():
    """Four processes of which only the first exists: collectives return at once, with any values."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield 4
    dist.destroy_process_group()


def sharded(config: ModelConfig, ranks: int) -> Transformer:
    """The share of the first process."""
    model = Transformer(config)
    shard(torch.device("cpu"), torch.bfloat16, model)
    return model


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors that are gathered and reduced."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather" in str(function):
            self.gathered += args[0].nbytes  # the output
        if "reduce_scatter" in str(function):
            self.reduced += args[1].nbytes  # the input
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [GQA, replace(MOE, layers=2), replace(GQA, tied=True)], ids=["gqa", "moe", "tied"])
def test_a_rank_holds_what_torch_gives_it(ranks, config):
    model, job = sharded(config, ranks), replace(JOB, config=config, gpus=ranks)
    held = [p.to_local() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    optimizer.step()
    states = [x.to_local() for state in optimizer.state.values() for x in state.values() if x.ndim]
    parts = memory_parts(job)
    buffers = sum(x.nbytes for x in model.buffers())
    assert parts["weights"] == parts["reference"] == sum(x.nbytes for x in held) + buffers and parts["masters"] == 0
    assert parts["gradients"] == sum(x.nbytes for x in held) and parts["moments"] == sum(x.nbytes for x in states)
    with gathered(model):
        assert parts["copy"] == plan.copy_bytes(job) == sum(p.nbytes for p in model.parameters())


def test_shares_of_a_rank_by_hand():
    N = sum(p.numel() for p in JOB.model.parameters())
    block, outside = sum(p.numel() for p in JOB.model.blocks[0].parameters()), 2 * 64 * 32 + 32
    parts, alone = memory_parts(replace(JOB, gpus=4)), memory_parts(JOB)
    assert (parts["weights"], parts["moments"], parts["reference"]) == (4 * N // 4, 8 * N // 4, 4 * N // 4)
    assert parts["copy"] == 2 * N and parts["cache"] == alone["cache"] // 4 and parts["rollout"] == alone["rollout"]
    assert parts["gathered"] == 2 * (2 * block + 2 * outside) + 6 * block
    sampling = parts["cache"] + parts["sampling"] + parts["copy"]
    training = sum(parts[name] for name in ("gradients", "activations", "logits", "gathered"))
    assert peak(parts) == sum(parts.values()) - min(sampling, training)


def test_ranks_sample_whole_prompts():
    job = replace(JOB, gpus=3)
    assert job.rows_here == 12 and memory_parts(job)["cache"] == memory_parts(JOB)["cache"] * 12 // 32


def test_experts_are_divided_where_the_ranks_divide_their_number():
    """Over 8 ranks the 8 experts stay where they are, over 6 they are gathered with their block; all are copied."""
    eight, six = replace(JOB, config=MOE, gpus=8), replace(JOB, config=MOE, gpus=6)
    assert (eight.divided, six.divided, replace(JOB, gpus=8).divided) == (8, 1, 1)
    N, routed = sum(plan.parameters(eight)), plan.parameters(eight)[1]
    assert routed == 2 * 8 * 3 * 32 * 16
    parts = {job.gpus: memory_parts(job) for job in (eight, six)}
    assert parts[8]["copy"] == parts[6]["copy"] == 2 * N
    outside, largest, experts = numbers_of_units(eight.model, True)
    assert sum(experts) == routed and outside == 2 * 64 * 32 + 32
    layer = max(experts) // 8
    assert parts[8]["gathered"] == 4 * (largest + outside) + 6 * largest + 2 * routed // 8 + 6 * layer
    again = memory_parts(replace(eight, recompute=True))["gathered"]
    assert parts[8]["gathered"] - again == 2 * (routed - max(experts)) // 8
    _, whole, _ = numbers_of_units(eight.model, False)
    assert max(experts) < whole < largest + max(experts)  # the first layer has no experts, and is the largest without
    assert parts[6]["gathered"] == 4 * (whole + outside) + 6 * whole
    assert plan.copied(replace(eight, experts=8)) == N - routed * 7 // 8  # in another program


def test_adapters_need_no_second_copy_and_little_state():
    whole, adapters = (memory_parts(replace(JOB, gpus=4, lora_rank=rank)) for rank in (0, 2))
    assert adapters["reference"] == 0 and adapters["moments"] < whole["moments"] / 5
    assert 4 * sum(p.numel() for p in JOB.model.parameters()) // 4 < adapters["weights"] < 1.2 * whole["weights"]
    assert adapters["gathered"] < whole["gathered"] / 2


def test_a_node_holds_the_whole_model_once_for_each_rank():
    N = sum(plan.parameters(JOB))
    hosts = [plan.host_bytes(replace(JOB, gpus=n, reference=r)) for n, r in ((2, True), (8, True), (8, False))]
    assert hosts == [2 * 8 * N, 4 * 8 * N, 4 * 4 * N]  # four GPUs in a node
    assert plan.host_bytes(replace(JOB, gpus=8, lora_rank=2)) < 4 * 4.5 * N


# ---- bytes, arithmetic, seconds ------------------------------------------------------------------


def test_bytes_exchanged_by_hand():
    job = replace(JOB, gpus=4, reference=False)
    N, other = sum(plan.parameters(job)), 2 * 64 * 32 + 32
    assert job.rows_here == 8 and job.passes == 1  # 8 rows of 32 tokens
    moved = traffic(job)
    assert moved["gather"] == 2 * (2 * (N - other) + other) * 3 / 4
    assert moved["reduce"] == 4 * N * 3 / 4 and moved["experts"] == 0
    assert moved["copy"] == 2 * 2 * N * 3 / 4  # to sample, and to check the first ratio
    assert traffic(replace(job, reference=True)) == moved | {"copy": 3 * 2 * N * 3 / 4}
    assert traffic(replace(job, microbatch=64))["reduce"] == 4 * moved["reduce"]
    assert traffic(replace(job, kind="sft", answers=1, prompt=0))["copy"] == 0
    assert set(traffic(JOB).values()) == {0.0}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("config", [GQA, replace(GQA, tied=True)], ids=["gqa", "tied"])
def test_torch_gathers_and_reduces_as_many_bytes(ranks, config):
    model, job = sharded(config, ranks), replace(JOB, config=config, gpus=ranks, reference=False)
    with Collectives() as bytes_of:
        model.logprob(torch.zeros(2, 8, dtype=torch.int64), lengths=torch.tensor([8, 8])).sum().backward()
    assert traffic(job)["gather"] == bytes_of.gathered * 3 / 4
    assert traffic(job)["reduce"] == bytes_of.reduced * 3 / 4


def test_tokens_are_sent_to_other_ranks_and_back():
    job = replace(JOB, config=MOE, gpus=8)
    tokens = 4 * 32
    # 2 MoE layers, 2 experts per token, there and back, forward and backward; 7 of 8 experts are elsewhere
    assert traffic(job)["experts"] == 2 * 2 * 2 * 2 * tokens * 32 * 2 * 7 / 8
    assert traffic(replace(job, experts=4))["experts"] == 2 * 2 * 2 * 2 * tokens * 32 * 2 * 3 / 4
    assert traffic(replace(job, gpus=6))["experts"] == 0
    assert traffic(replace(job, recompute=True))["experts"] == 1.5 * traffic(job)["experts"]


def test_in_a_node_seconds_are_bytes_over_the_width():
    for config in (GQA, MOE):
        job = replace(JOB, config=config, gpus=4)
        moved, links = traffic(job), plan.link_seconds(job)
        updated = moved["gather"] + moved["reduce"] + moved["experts"]
        assert links["update"] == pytest.approx(updated / DEVICE.link) and bool(moved["experts"]) == (config is MOE)
        assert links["rollout"] + links["reference"] == pytest.approx(moved["copy"] / DEVICE.link)


def test_flops_of_the_passes():
    work = plan.flops(replace(JOB, recompute=True))
    forward = 32 * 32 * forward_flops(JOB.model, 16.5)
    assert (work["forward"], work["recomputed"], work["reference"]) == (forward,) * 3
    assert work["backward"] == 2 * forward
    assert work["prefill"] == 8 * 8 * forward_flops(JOB.model, 4.5)
    adapters = plan.flops(replace(JOB, lora_rank=2))
    assert adapters["backward"] == adapters["forward"] > forward


def test_decoding_reads_the_weights_and_the_cache():
    N = sum(plan.parameters(JOB)) - 64 * 32  # one row of the embedding is read
    cached = 3 * 2 * 2 * 8  # layers, keys and values, heads, size
    assert plan.decode_seconds(JOB, 5, 20) == pytest.approx(2 * (N + 5 * 20 * cached) / 1e9)
    slow = replace(JOB, gpu=replace(DEVICE, flops=1e3))
    assert plan.decode_seconds(slow, 5, 0) == pytest.approx(5 * matrix_flops(JOB.model) / 1e3)
    routed = replace(JOB, config=MOE)
    less = plan.decode_seconds(routed, 4, 0) - plan.decode_seconds(routed, 1, 0)
    assert less == pytest.approx(2 * 0.75 * plan.parameters(routed)[1] / 1e9)  # 2 of 8 experts for one row


def test_a_step_is_the_sum_of_its_bounds():
    """One GPU, slow arithmetic: everything by hand."""
    job = replace(JOB, gpu=replace(DEVICE, flops=1e6))
    work, times = plan.flops(job), seconds(job)
    read = 30 * sum(plan.parameters(job)) / 1e9
    assert times["update"] == pytest.approx((work["forward"] + work["backward"]) / 1e6 + read)
    assert times["reference"] == pytest.approx(work["reference"] / 1e6)
    assert times["rollout"] == pytest.approx(work["prefill"] / 1e6 + 24 * plan.decode_seconds(job, 32, 20))
    assert set(seconds(replace(job, kind="sft", answers=1, prompt=0))) == {"update"}


@pytest.mark.parametrize("change", [{}, {"gpus": 4}, {"gpus": 8}, {"config": MOE, "gpus": 8}])
def test_what_is_realistic_takes_longer_than_the_bound(change):
    job = replace(JOB, **change)
    least, likely = seconds(job), seconds(job, realistic=True)
    assert all(likely[part] > least[part] > 0 for part in least)


def test_jobs_that_do_not_exist():
    with pytest.raises(ValueError, match="gpus = 9: at most the 8 prompts"):
        replace(JOB, gpus=9)
    with pytest.raises(ValueError, match="gpus = 33: at most the 32 rows"):
        replace(JOB, gpus=33, kind="sft", answers=1, prompt=0)
    with pytest.raises(ValueError, match="experts = 3: must divide the 6 GPUs and the model's 8 experts"):
        replace(JOB, config=MOE, gpus=6, experts=3)
    with pytest.raises(ValueError, match="experts = 2"):
        replace(JOB, gpus=4, experts=2)
    with pytest.raises(ValueError, match="kind = 'dpo': one of rl, sft, pretrain"):
        replace(JOB, kind="dpo")


# ---- published shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, total", [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304),
                                         ("qwen2.5-7b", 7_615_616_512), ("llama-3.1-8b", 8_030_261_248)])  # fmt: skip
def test_published_totals(name, total):
    assert sum(plan.parameters(Job(PRESETS[name], gpu("h100")))) == total


# ---- the command ---------------------------------------------------------------------------------


def test_sixteen_bytes_of_a_7b_model_do_not_fit_and_what_does_is_named(capsys):
    config = command.Config("qwen2.5-7b", gpu="h100", prompts=16)
    with pytest.raises(ValueError, match="qwen2.5-7b needs .* GiB on each of 1 GPUs, of which 73.6 GiB are usable"):
        command.main(config)
    assert "moments" in capsys.readouterr().out
    ways = dict(command.ways_to_fit(command.job_of(config)))
    assert "--recompute" not in ways and ways["--lora-rank 16 --recompute"] < 73.6
    (more,) = [options for options in ways if options.startswith("--gpus") and "recompute" not in options]
    smallest = int(more.split()[1])
    assert plan.fits(command.job_of(replace(config, gpus=smallest)))
    assert not plan.fits(command.job_of(replace(config, gpus=smallest // 2)))


TOO_LARGE = {
    "rows": command.Config("qwen2.5-1.5b", gpu="rtx4090", prompts=64, max_completion_length=8192, microbatch=65_536),
    "experts": command.Config("qwen3-30b-a3b", gpu="h100", prompts=2, num_generations=2),
}


@pytest.mark.parametrize("config", TOO_LARGE.values(), ids=TOO_LARGE)
def test_every_way_that_is_named_is_tried(config):
    job = command.job_of(config)
    ways = command.ways_to_fit(job)
    assert ways and not plan.fits(job)
    for options, gib in ways:
        words = options.replace("--", "").replace("-", "_").split()
        changed, i = {}, 0
        while i < len(words):
            if words[i] == "recompute":
                changed["recompute"], i = True, i + 1
            else:
                number = float(words[i + 1])
                changed[words[i]], i = number if words[i] == "beta" else int(number), i + 2
        again = command.job_of(replace(config, **changed))
        assert plan.fits(again) and peak(memory_parts(again)) / GIB == pytest.approx(gib), options


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_a_model_whose_copy_does_not_fit_is_refused_on_any_number_of_gpus(kind):
    config = command.Config("deepseek-v3", gpus=512, gpu="b200", prompts=512, kind=kind, recompute=True)
    with pytest.raises(ValueError, match="deepseek-v3 .* a copy of all weights, 1,272 GiB, .* no GPU has as much"):
        command.main(config)
    job = command.job_of(replace(config, model="qwen3-30b-a3b", gpu="a100-40"))
    assert not plan.fits(job) and "57 GiB" in (text := command.refusal("qwen3-30b-a3b", job))
    assert text.endswith("larger GPUs are b200, h200, h100, h800, a100-80") and plan.copy_bytes(job) > 0


def test_the_bars_of_the_figure_are_the_parts(tmp_path):
    job = replace(JOB, gpus=4, prompt=64)
    figure = plan_figure.draw("toy", job, tmp_path / "plan.png")
    widths = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    assert max(widths) == pytest.approx(peak(memory_parts(job)) / GIB)
    twice = ("weights", "moments", "reference", "rollout")
    assert len(widths) == sum(n > 0 for n in memory_parts(job).values()) + len(twice)


def test_a_plan_is_printed_and_drawn(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(GQA)))
    result = command.main(command.Config(str(tmp_path), gpus=8, out=tmp_path / "plan.png"))
    text = capsys.readouterr().out
    assert f"memory of a node: {result['memory/host_gib']:.0f} GiB, as each of 8 ranks reads" in text
    assert "lower bound" in text and "gather, received by a GPU" in text and "peak" in text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert 0 < result["seconds/least"] < result["seconds/realistic"]
    with pytest.raises(ValueError, match="mean_length = 2000.0: at most max_completion_length = 1024"):
        command.Config("qwen2.5-7b", mean_length=2000.0)
    command.main(command.Config("minir1", kind="pretrain", prompts=8, dtype="float32", gpu="laptop"))
    assert "rollout" not in capsys.readouterr().out
