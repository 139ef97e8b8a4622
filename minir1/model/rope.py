"""Rotary position embedding (RoFormer, arXiv:2104.09864, section 3.2.2), and how its window is extended."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minir1.device import widest
from minir1.model.typed import check_types

KINDS = ("none", "linear", "ntk", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How a model trained on `original` positions reaches `factor` times as many.

    linear  θ_j <- θ_j/s for every pair (position interpolation, arXiv:2306.15595)
    ntk     θ <- θ·s^(R/(R-2)): the fastest pair unchanged, the slowest divided by s
    yarn    pairs that turn more than β times in the window unchanged, those that turn less than α times divided by s,
            a ramp between (arXiv:2309.00071, section 3.2); attention's logits are rescaled, see `magnitude`
    llama3  as yarn, with a ramp over turns in the window instead of pairs, and no rescaling (Llama 3.1)

    Raises ValueError when a value is out of range.
    """

    kind: str = "none"  # none | linear | ntk | yarn | llama3
    factor: float = 1.0  # s
    original: int | float = 4096  # L, positions of the window before
    slow: float = 1.0  # α of YaRN (beta_slow), low_freq_factor of Llama 3: turns in the window
    fast: float = 32.0  # β of YaRN (beta_fast), high_freq_factor of Llama 3, which has 4
    mscale: float | None = None  # YaRN: strength of the factor on cos and sin; used together with mscale_all only
    mscale_all: float | None = None  # mscale_all_dim: strength of the factor on MLA's softmax scale
    attention_factor: float | None = None  # YaRN: the factor on cos and sin itself
    whole_pairs: bool = True  # YaRN: the ends of the ramp are rounded to whole pairs

    def __post_init__(self):
        check_types(self)
        if self.kind not in KINDS:
            raise ValueError(f"RopeScaling.kind = {self.kind!r}: one of {', '.join(KINDS)}")
        for name, least in {"factor": 1, "original": 1, "slow": 1e-6, "fast": 1e-6}.items():
            if not least <= getattr(self, name) <= 1e9:
                raise ValueError(f"RopeScaling.{name} = {getattr(self, name)!r}: {least:g} to 1e9")
        for name in ("mscale", "mscale_all", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1e6:
                raise ValueError(f"RopeScaling.{name} = {value!r}: 0 to 1e6, or None")
        if self.kind == "none" and self.factor != 1:
            raise ValueError(f"RopeScaling.factor = {self.factor!r}: kind = 'none' scales nothing, so it must be 1")
        if self.kind in ("yarn", "llama3") and not self.slow < self.fast:
            raise ValueError(f"RopeScaling.slow = {self.slow}: must be below fast = {self.fast}")

    def _strength(self, mscale: float) -> float:
        """0.1·m·ln s + 1 (arXiv:2309.00071, equation 22)"""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin: its square is the factor on the part of the logits that depends on position."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all:
            return self._strength(self.mscale) / self._strength(self.mscale_all)
        return self._strength(1.0)

    @property
    def logit_factor(self) -> float:
        """Factor on MLA's softmax scale, so on all of the logits: (0.1·mscale_all·ln s + 1)²."""
        return self._strength(self.mscale_all) ** 2 if self.kind != "none" and self.mscale_all else 1.0


def inverse_frequencies(size: int, theta: float, scaling: RopeScaling = RopeScaling(), device=None) -> Tensor:
    """The angle of each pair per position, θ_j = θ^(-2j/R) before scaling: fp64 [R/2] with R = size, fp32 without fp64.

    yarn and llama3: θ_j <- (1 - γ_j)·θ_j + γ_j·θ_j/s, where the ramp γ_j is 0 for pairs that turn often in the original
    window and 1 for slow ones (arXiv:2309.00071, section 3.2, whose γ is 1 - γ_j).
    """
    device = torch.device("cpu" if device is None else device)
    even = torch.arange(0, size, 2, dtype=widest(device), device=device)
    if scaling.kind == "ntk" and size > 2:  # a single pair is the fastest
        theta = theta * scaling.factor ** (size / (size - 2))
    plain = theta ** (-even / size)
    if scaling.kind in ("none", "ntk"):
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * math.pi)  # in the original window
        keep = ((turns - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
    else:
        keep = 1 - _yarn_ramp(size, theta, scaling, device)
    return plain * keep + plain / scaling.factor * (1 - keep)


def _yarn_ramp(size: int, theta: float, scaling: RopeScaling, device) -> Tensor:
    """0 for pairs that turn more than β times in the original window, 1 for those below α, linear between: [R/2]."""

    def pair(turns: float) -> float:  # the index i at which L·θ^(-2i/R) is that many turns
        return size * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.fast), pair(scaling.slow)
    if scaling.whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    return ((torch.arange(size // 2, dtype=widest(device), device=device) - low) / (high - low)).clamp(0, 1)


def rope_freqs_cis(size: int, positions: Tensor, theta: float, scaling: RopeScaling = RopeScaling()) -> Tensor:
    """m·e^{i·p·θ_j}, the factor of pair j at position p: θ_j = θ^(-2j/R) before scaling, m the scaling's magnitude.

    positions: int64 [...]; returns complex64 [..., R/2] with R = size.
    """
    inverse = inverse_frequencies(size, theta, scaling, positions.device)
    angles = positions.unsqueeze(-1) * inverse  # in fp64: at position 131,072 the error of fp32 angles is 1e-2
    return torch.polar(torch.full_like(angles, scaling.magnitude), angles).to(torch.complex64)


def rotate(x: Tensor, freqs_cis: Tensor, interleaved: bool) -> Tensor:
    """Multiply the pairs of x by their factors: (a + ib)·e^{iφ} = a·cos φ - b·sin φ + i(a·sin φ + b·cos φ).

    x: [..., H, R]; freqs_cis: complex64 [..., R/2], the same for every head. Pairs are (x_2j, x_2j+1) when interleaved,
    as in DeepSeek, else (x_j, x_{j+R/2}), as in Llama and Qwen. Returns x's shape and dtype; the product is in fp32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:  # always copied: a slice of one token may begin at an odd number
        pairs = wide.unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)
    else:
        pairs = torch.stack(wide.chunk(2, dim=-1), dim=-1)
    turned = torch.view_as_real(torch.view_as_complex(pairs) * freqs_cis.unsqueeze(-2))
    return (turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), dim=-1)).to(x.dtype)
