"""A backward pass that has none of its own."""
import torch


def differentiable_once(backward):
    """RuntimeError under create_graph=True, where the second derivative would be left out without a word."""
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: a kernel has no second derivative")
        return backward(ctx, *grads)

    return run
