"""minir1: the DeepSeek-R1 recipe in plain PyTorch, small enough to read and real enough to use.

A dense or mixture-of-experts transformer that also loads published checkpoints; pre-training; reinforcement learning
with rule rewards (R1-Zero) by GRPO, PPO and their relatives; reward models and DPO; Triton kernels. The library holds
small functions; the algorithms are in `experiments/`, one flat script a stage.

The letters of tensor comments, docstrings and einops patterns:

    B  rows of a batch      T  tokens of a row       N  tokens packed flat    M  packed keys
    D  model width          H  heads                 K  key/value heads       V  vocabulary
    E  experts              P  prompts               G  answers a prompt (B = P·G)

Entry [b, t] of anything describes token t: logp[b, t] = log π(x_t | x_<t). A suffix such as `lp_NV` spells a
shape. This file imports nothing, so that what needs no torch (tasks, rewards) stays free of it.
"""

__version__ = "0.1.0"
