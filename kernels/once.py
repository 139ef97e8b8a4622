"""Backward passes that cannot be differentiated again."""
import torch


def refuse_second_derivative() -> None:
    """RuntimeError in a backward pass under create_graph=True. torch's once_differentiable raises none where the
    upstream gradient is a constant, as that of a sum."""
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True: a kernel has no second derivative")
