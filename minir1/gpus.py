"""GPUs as a planner sees them: memory, arithmetic, and the widths of what data passes through.

Figures are those of the vendor's data sheets for dense products in bfloat16 with sums in fp32: tables print twice as
much for sparse matrices. Widths of links count one direction: data sheets add both. Outside a node, a GPU has the
network adapter of the vendor's own server (DGX); for cards without NVLink PCIe 4.0 and 200 Gbit/s per node are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One device and its links."""

    memory: int  # bytes
    flops: float  # FLOP/s of dense products in bf16
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its node, one direction
    network: float  # bytes/s out of the node, one direction, of one GPU
    source: str
    node: int = 8  # GPUs per node


DGX_H100 = "400 Gbit/s per GPU (DGX H100)"
GPUS = {
    "b200": GPU(180 * GIB, 2250e12, 8.0e12, 900e9, 50e9, "NVIDIA DGX B200 data sheet"),
    "h200": GPU(141 * GIB, 989e12, 4.8e12, 450e9, 50e9, f"NVIDIA H200 SXM data sheet; {DGX_H100}"),
    "h100": GPU(80 * GIB, 989e12, 3.35e12, 450e9, 50e9, f"NVIDIA H100 SXM data sheet; {DGX_H100}"),
    "h800": GPU(80 * GIB, 989e12, 3.35e12, 200e9, 50e9, "an H100 with 400 GB/s of NVLink (arXiv:2505.09343)"),
    "a100-80": GPU(80 * GIB, 312e12, 2.04e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet; 200 Gbit/s per GPU"),
    "a100-40": GPU(40 * GIB, 312e12, 1.56e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet; 200 Gbit/s per GPU"),
    "l40s": GPU(45 * GIB, 362e12, 864e9, 32e9, 3.1e9, "NVIDIA L40S data sheet; 48 GB less those of ECC"),
    "rtx4090": GPU(24 * GIB, 165e12, 1.008e12, 32e9, 3.1e9, "NVIDIA Ada white paper"),
    "rtx3090": GPU(24 * GIB, 71e12, 936e9, 32e9, 3.1e9, "NVIDIA GA102 white paper"),
    "laptop": GPU(16 * GIB, 0.2e12, 40e9, 40e9, 0.1e9, "assumed: four cores with AVX2, two channels of DDR4, fp32", 1),
}


def gpu(name: str) -> GPU:
    """The GPU of this name; ValueError lists the names."""
    if name not in GPUS:
        raise ValueError(f"gpu = {name!r}: one of {', '.join(GPUS)}")
    return GPUS[name]


def collective_seconds(gpu: GPU, ranks: int, payload: float) -> float:
    """Seconds of an all-gather or reduce-scatter of `payload` bytes, spread over n ranks, at full width.

    A rank receives (n-1)/n of the payload. Over m nodes of k GPUs every byte enters a node once, through all of its k
    adapters, and is passed on inside it: the slower of payload·(n-1)/n / link and payload·(m-1)/m / (k·network).
    """
    nodes = -(-ranks // gpu.node)
    inside = payload * (ranks - 1) / ranks / gpu.link
    outside = payload * (nodes - 1) / nodes / (gpu.node * gpu.network)
    return inside if nodes == 1 else max(outside, inside if gpu.node > 1 else 0)


def exchange_seconds(gpu: GPU, ranks: int, payload: float) -> float:
    """Seconds of an all-to-all in which every one of n ranks sends `payload` bytes, an n-th of it to each rank."""
    near = min(ranks, gpu.node)
    return max(payload * (near - 1) / ranks / gpu.link, payload * (ranks - near) / ranks / gpu.network)
