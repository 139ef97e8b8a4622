"""The operations that have a Triton kernel, with the choice between the kernel and plain torch.

`reference.py` defines each operation in a few lines. `impl="auto"` takes the kernel where it can run (CUDA with
Triton) and torch elsewhere; `"triton"` and `"torch"` insist on one of them, and a kernel that is asked for by name and
cannot run is an error. The environment variable MINIR1_KERNELS (auto | triton | torch) sets what "auto" means.
`linear_top` has no kernel.
"""
from .attention import attention
from .decode import decode_attention, decode_latent
from .kl import linear_kl
from .logprob import linear_logprob
from .top import linear_top

__all__ = ["attention", "decode_attention", "decode_latent", "linear_kl", "linear_logprob", "linear_top"]
