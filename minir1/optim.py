"""Optimizers: Muon for matrices (single or stacked), AdamW for the rest; 16-bit weights are trained by fp32 masters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minir1.distributed import computed_in, divided, joint_norm, local, whole
from minir1.model.shards import not_finite

# Quintics a·σ + b·σ³ + c·σ⁵. Each minimises max |p(σ) - 1| over the interval to which the ones before it map [0.01, 1]
# (Polar Express, arXiv:2505.16932, section 3).
POLAR = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonalize(g: Tensor) -> Tensor:
    """Push the singular values of each matrix towards 1: U S Vᵀ -> about U Vᵀ, by odd quintics, as in Muon (Jordan et
    al. 2024, "Muon: an optimizer for hidden layers").

    X <- (aI + bA + cA²)X with A = XXᵀ, from X = G / ‖G‖_F. g: [..., m, n], any number of matrices at once; the result
    has its shape and dtype. A singular value of at least 0.01·‖G‖_F becomes one between 0.73 and 1.27, a smaller one is
    multiplied by at most 78.4.
    """
    x = g.flatten(0, -3) if g.ndim > 2 else g.unsqueeze(0)
    x = x.mT if g.shape[-2] > g.shape[-1] else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR:
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        x = factor @ x
    return (x.mT if g.shape[-2] > g.shape[-1] else x).reshape(g.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: M <- μM + G, W <- W - lr·√max(1, m/n)·orthogonalize(G + μM), with decoupled decay.

    Parameters are matrices [m, n] or stacks of them [E, m, n] (experts); those of one shape are orthogonalized
    together. torch.optim.Muon refuses stacks. Of a matrix in shards each rank orthogonalises the whole, which it
    gathers; of a stack its own experts, which are whole.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        params = list(params)
        for p in params:
            if p.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices or stacks of matrices, got shape {tuple(p.shape)}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape[-2:])].append(p)
            for (m, n), params in by_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    momentum = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(momentum, alpha=group["momentum"])
                    updates.append((local(update) if p.ndim == 3 else whole(update)).view(-1, m, n))
                update = orthogonalize(torch.cat(updates))
                for p, part in zip(params, update.split([len(u) for u in updates])):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    part = local(divided(part.view(m, n))) if p.ndim == 2 else part
                    local(p).add_(part.view_as(local(p)), alpha=-group["lr"] * math.sqrt(max(1.0, m / n)))


class Masters:
    """An optimizer for weights of which some have 16 bits: it steps fp32 copies, the masters, and rounds them down.

        g_master <- g        one step on the masters, in fp32        w <- round(master)

    A step below 2^-9 of a bfloat16 weight is lost in the weight, but adds up in its master. Weights of 32 or 64 bits
    are their own masters. Each backward pass adds its gradient to the master's, in fp32, and frees the 16-bit one, so
    that the sum over micro-batches is not rounded. The interface is that of torch's optimizers; the state includes the
    masters, so a resumed run has the same bits. Weights in shards (minir1/distributed.py) are masters already.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        parameters = list(parameters)
        self.weights = [p for p in parameters if p.dtype.itemsize < 4]
        copies = {p: nn.Parameter(p.detach().float()) for p in self.weights}
        self.masters = [copies.get(p, p) for p in parameters if computed_in(p).itemsize < 4]
        self.inner = make([copies.get(p, p) for p in parameters])
        for weight, master in copies.items():
            weight.master = master
            weight.register_post_accumulate_grad_hook(_add_to_master)

    @property
    def param_groups(self) -> list[dict]:
        """Those of the inner optimizer, for learning rates; "params" are the masters."""
        return self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """One update of every weight that has a gradient."""
        for weight in self.weights:
            if weight.grad is not None:  # assigned, not from a backward pass
                _add_to_master(weight)
        self.inner.step()
        for weight, master in zip(self.weights, self.masters):
            if master.grad is not None:
                weight.copy_(master)
                master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """The masters, and the state of the inner optimizer."""
        return {"masters": [master.detach() for master in self.masters], "optimizer": self.inner.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`; the weights become the rounded masters.

        ValueError for the state of an optimizer of other weights, or of one without masters.
        """
        shapes = [tuple(master.shape) for master in self.masters]
        if [tuple(master.shape) for master in state.get("masters", ())] != shapes:
            raise ValueError(f"the state does not hold {len(shapes)} masters of the shapes of these weights")
        self.inner.load_state_dict(state["optimizer"])
        for master, saved in zip(self.masters, state["masters"]):
            master.copy_(saved)
        for weight in self.weights:
            weight.copy_(weight.master)


def _add_to_master(weight: nn.Parameter) -> None:
    """Move a 16-bit gradient to the weight's master."""
    gradient, weight.grad = weight.grad.float(), None
    weight.master.grad = gradient if weight.master.grad is None else weight.master.grad.add_(gradient)


def _with_masters(parameters, make):
    """An optimizer of those that take a gradient; without masters where no weight computes in 16 bits."""
    parameters = [p for p in parameters if p.requires_grad]
    return Masters(parameters, make) if any(computed_in(p).itemsize < 4 for p in parameters) else make(parameters)


def adamw(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
) -> torch.optim.AdamW | Masters:
    """torch's AdamW, over fp32 masters where weights have 16 bits."""
    return _with_masters(parameters, lambda ps: torch.optim.AdamW(ps, lr, betas, weight_decay=weight_decay, fused=True))


def muon(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
) -> Muon | Masters:
    """Muon, over fp32 masters where weights have 16 bits."""
    return _with_masters(parameters, lambda ps: Muon(ps, lr, momentum, weight_decay))


def clip_gradients(model: nn.Module, largest: float, step: int) -> float:
    """Scale the gradients, in place, to a joint norm over all ranks of at most `largest`; returns the norm before.

    RuntimeError with step and tensor where a gradient is not finite, on all ranks and with the one where it began; no
    weight has changed by then.
    """
    holders = {name: getattr(p, "master", p) for name, p in model.named_parameters()}  # of 16-bit weights the masters
    gradients = [local(p.grad) for p in holders.values() if p.grad is not None]
    # In fp32 at least: a norm in bfloat16 has three digits.
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    norm = joint_norm(torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(()))
    if not norm.isfinite():
        bad = [name for name, p in holders.items() if p.grad is not None and not local(p.grad).isfinite().all()]
        names = ", ".join(bad[:3]) or "all tensors together"
        raise RuntimeError(f"step {step}: the gradient of {names} is not finite{not_finite(model)}")
    if gradients:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


@torch.no_grad()
def ema_update(reference: nn.Module, model: nn.Module, tau: float) -> None:
    """θ_ref <- (1 - τ) θ_ref + τ θ, in place: an exponential moving average of the policy as reference.

    Buffers (the selection bias of experts) move too. ValueError for τ outside 0 … 1, and for a 16-bit reference, in
    which small steps vanish; the reference of a 16-bit policy is copy.deepcopy(model).float().
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau = {tau}: 0 to 1")
    both = ((*m.parameters(), *m.buffers()) for m in (reference, model))  # a tied matrix once
    for value, new in zip(*both, strict=True):
        if value.dtype.itemsize < 4:
            raise ValueError(f"the reference is in {value.dtype}, where small steps vanish: keep it in float32")
        value.lerp_(new.to(value), tau)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside blocks and MTP modules, for Muon; embedding, head, router, norms and biases, for AdamW."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        name = name.removeprefix("_orig_mod.")  # torch.compile's
        inside = name.startswith(("blocks.", "mtp.")) and p.ndim >= 2 and "router" not in name
        (matrices if inside else rest).append(p)
    return matrices, rest


def warmup_stable_decay(step: int, steps: int, warmup: int, decay_from: float = 0.5) -> float:
    """Factor on the learning rate: linear up over `warmup` steps, 1, then linear to 0 from `decay_from` of the run."""
    up = min(1.0, (step + 1) / max(warmup, 1))
    return min(up, max(0.0, (steps - step) / max(1.0, steps * (1 - decay_from))))


def warmup_cosine(step: int, steps: int, warmup: int, last: float = 0.1) -> float:
    """Factor on the learning rate: linear up over `warmup` steps, then half a cosine, from 1 to `last` at the end."""
    warmup = max(warmup, 1)
    done = min(1.0, max(0, step + 1 - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / warmup) * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)
