"""sharded_state.py: states of divided tensors on other numbers of ranks, to the bit, and what is damaged is named."""

import shutil

import pytest
import torch
from ranks import on_ranks
from toys import DENSE

from minir1 import checkpoint
from minir1.distributed import divided, rank, whole, world
from minir1.model.shards import shard
from minir1.model.transformer import Transformer
from minir1.optim import Masters, adamw
from minir1.policy import put_back

SHAPES = [(5, 4), (1, 3), (2,), (7,)]  # also fewer rows than ranks


def tensors():
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]


def trained(steps: int):
    """A model that computes in bfloat16, and its optimizer after some updates with the same gradients everywhere."""
    torch.manual_seed(1)
    model = Transformer(DENSE).to(torch.bfloat16)
    model = model.float() if world() > 1 else model  # as `distributed.load_target` says
    shard(torch.device("cpu"), torch.bfloat16, model)
    optimizer = adamw(model.parameters(), 0.1)
    for step in range(steps):
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad = divided(gradient) if hasattr(p, "full_tensor") else gradient
        optimizer.step()
    return model, optimizer


def save(folder):
    """A checkpoint by all ranks; rank 0 writes the model."""
    write = lambda path: rank() or (path / "model.safetensors").write_bytes(b"weights")
    optimizer = trained(2)[1]
    assert isinstance(optimizer, Masters)
    state = {"step": 3, "list": [{"w": divided(x), "plain": x} for x in tensors()], "optimizer": optimizer.state_dict()}
    checkpoint.save(folder, 3, write, state)


def opened(path):
    """The tensors of a checkpoint, and the masters and moments of an optimizer to which it was restored."""
    state = checkpoint.load_state(path)
    optimizer = trained(0)[1]
    put_back(optimizer, state["optimizer"])
    moments = [{key: whole(x) for key, x in values.items()} for values in optimizer.inner.state.values()]
    weights = [whole(p.detach()) for p in optimizer.param_groups[0]["params"]]
    return state["step"], [[whole(x["w"]), x["plain"]] for x in state["list"]], weights, moments


def refusal(path):
    """What `load_state` says to this rank."""
    with pytest.raises(ValueError) as error:
        checkpoint.load_state(path)
    return str(error.value)


def no_space(folder):
    """What saving says where rank 1 cannot write."""
    from torch.distributed.checkpoint import FileSystemWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    FileSystemWriter.write_data = full if rank() == 1 else FileSystemWriter.write_data
    with pytest.raises(RuntimeError) as error:
        save(folder)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint that two ranks have saved."""
    folder = tmp_path_factory.mktemp("state")
    on_ranks(2, save, folder)
    return checkpoint.latest(folder)


def assert_right(result):
    step, lists, weights, moments = result
    model, optimizer = trained(2)
    assert step == 3 and len(weights) == len(moments) == len(list(model.parameters()))
    for pair, x in zip(lists, tensors(), strict=True):
        assert all(torch.equal(y, x) for y in pair)
    for weight, p in zip(weights, optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(weight, p) and weight.dtype == torch.float32 and (weight.bfloat16() != weight).any()
    for values, wanted in zip(moments, optimizer.inner.state.values(), strict=True):
        assert all(torch.equal(values[key], wanted[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_states_and_masters_on_another_number_of_ranks(saved, ranks):
    for result in [opened(saved)] if ranks == 1 else on_ranks(ranks, opened, saved):
        assert_right(result)


def test_one_process_saves_for_two(tmp_path):
    save(tmp_path)
    for result in on_ranks(2, opened, checkpoint.latest(tmp_path)):
        assert_right(result)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_damaged_and_missing_files_are_named(saved, tmp_path, name):
    file = shutil.copytree(saved, tmp_path / "copy") / "training_state" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert refusal(tmp_path / "copy").startswith(f"{file} has changed since the run saved its digest")
    if name.startswith("__1"):
        assert {*on_ranks(2, refusal, tmp_path / "copy")} == {refusal(tmp_path / "copy")}
    file.unlink()
    assert refusal(tmp_path / "copy").startswith(f"{file} has changed since")


def test_a_rank_that_cannot_write_is_named(tmp_path):
    for message in on_ranks(2, no_space, tmp_path):
        assert "training_state cannot be written: rank 1: [Errno 28] No space left on device" in message
    assert checkpoint.resume(tmp_path) is None and [path.name for path in tmp_path.iterdir()] == ["latest"]
