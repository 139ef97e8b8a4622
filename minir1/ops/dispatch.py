"""Choose Triton or torch: by `impl=`, or for "auto" by the variable MINIR1_KERNELS."""
import functools
import importlib.util
import os

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels


@functools.cache
def kernels_missing() -> str | None:
    """Why minir1.kernels cannot be imported here, None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not os.path.isdir(os.path.join(os.path.dirname(os.path.dirname(__file__)), "kernels")):
        return "minir1/kernels, a link to kernels/, is missing from this checkout"
    return None


def use_triton(impl: str, *tensors: Tensor, unfit: str | None = None) -> bool:
    """Whether to run the kernel on these tensors, floats on one device.

    unfit: why the kernel cannot compute this call, or None. ValueError for an unknown impl, and for "triton" where the
    kernel cannot run.
    """
    asked = f"impl={impl!r}"
    if impl == "auto":
        impl = os.environ.get("MINIR1_KERNELS") or "auto"
        asked = f"MINIR1_KERNELS={impl}"
    if impl not in IMPLS:
        raise ValueError(f"{asked}: choose one of {', '.join(IMPLS)}")
    if impl == "torch":
        return False
    on_cuda = all(x.is_cuda for x in tensors)
    why_not = kernels_missing() or unfit
    if not on_cuda and (impl == "auto" or os.environ.get("TRITON_INTERPRET") != "1"):
        why_not = f"the tensors are on {tensors[0].device}, and Triton runs on CUDA"
    elif len({x.dtype for x in tensors}) > 1 or tensors[0].dtype not in DTYPES:
        why_not = f"it wants one dtype of fp32, bf16, fp16, not {', '.join(str(x.dtype) for x in tensors)}"
    if why_not and impl == "triton":
        raise ValueError(f"{asked}: {why_not}")
    return why_not is None
