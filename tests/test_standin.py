"""standin.py: the device without hardware of other tests."""

import copy
import io

import pytest
import standin
import torch

DEVICE = standin.register()


def test_views_share_memory_and_results_are_those_of_the_cpu():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y = x.to(DEVICE)
    assert y.device.type == "standin" and torch.equal(y.cpu(), x)
    y[:, 1].zero_()
    x[:, 1].zero_()
    assert torch.equal(y.cpu(), x) and torch.equal((y @ y.T / 3).exp().cpu(), (x @ x.T / 3).exp())
    assert torch.equal(y.T[1:3].cpu(), x.T[1:3]) and y[y > 0].tolist() == x[x > 0].tolist()
    assert torch.equal(torch.arange(5, device=DEVICE).cpu(), torch.arange(5))


def test_tensors_are_copied_saved_and_loaded():
    tensors = {"a": torch.arange(6.0, device=DEVICE).view(2, 3).T, "number": torch.tensor(2.0, device=DEVICE)}
    tensors["empty"] = torch.empty(0, 3, device=DEVICE)
    file = io.BytesIO()
    torch.save(tensors, file)
    for device in (DEVICE, "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=device, weights_only=True)
        assert all(x.device.type == torch.device(device).type for x in loaded.values())
        assert all(torch.equal(loaded[name].cpu(), x.cpu()) for name, x in tensors.items())
    copied = copy.deepcopy(tensors)
    copied["a"].zero_()
    assert copied["a"].device == tensors["a"].device and tensors["a"].sum().item() == 15


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(4),
        lambda x: x @ torch.ones(4, 4),
        lambda x: torch.cat((x, torch.ones(1, 4))),
        lambda x: x[torch.tensor([0])],
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: torch.where(torch.ones(4, dtype=torch.bool), x, 0.0),
        lambda x: torch.add(x, x, out=torch.ones(3, 4)),
    ],
)
def test_mixing_devices_fails(mix):
    with pytest.raises(RuntimeError, match="device|on cpu among"):
        mix(torch.ones(3, 4, device=DEVICE))
    assert (torch.ones(2, device=DEVICE) * torch.tensor(2.0)).tolist() == [2, 2]  # a number is none
