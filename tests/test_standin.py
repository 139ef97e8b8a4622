"""standin.py: the device that the tests of others stand on."""

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


def test_a_step_of_training_is_that_of_the_cpu():
    def step(device):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        layer = layer.to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        layer(torch.ones(2, 4, device=device)).square().sum().backward()
        optimizer.step()
        return layer.weight.detach().cpu()

    assert torch.equal(step("cpu"), step(DEVICE))


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
