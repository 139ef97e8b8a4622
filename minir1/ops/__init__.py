"""The operations that have a Triton kernel: of each a torch twin, which defines it, and the choice between the two.

`impl="auto"` takes the kernel where it can run (CUDA and triton) and the twin elsewhere; `"triton"` and `"torch"`
insist, and what is asked for by name and cannot run is an error, never a quiet fallback. The environment variable
MINIR1_KERNELS (auto | triton | torch) says what "auto" means.
"""
from .attention import attention
from .decode import decode_attention, decode_latent
from .kl import linear_kl
from .logprob import linear_logprob

__all__ = ["attention", "decode_attention", "decode_latent", "linear_kl", "linear_logprob"]
