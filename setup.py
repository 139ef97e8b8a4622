"""Packaging of minir1.

The Triton kernels live in `kernels/` at the top and are imported as `minir1.kernels`, through the link
`minir1/kernels -> ../kernels`: an import package called `kernels` would break the one that Hugging Face
publishes and transformers imports. Hence no `__init__.py` there, and the extra entry in `packages`.
"""
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "minir1" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.M)[1]  # read, not imported
KERNELS = ["minir1.kernels"] if (HERE / "minir1" / "kernels").is_dir() else []  # none without links

setup(
    name="minir1",
    version=VERSION,
    description="The DeepSeek-R1 recipe in plain PyTorch: small enough to read, real enough to use",
    author="the minir1 authors",
    license="MIT",
    python_requires=">=3.10",
    package_dir={"": "."},
    packages=find_packages(include=["minir1", "minir1.*"]) + KERNELS,
    install_requires=[
        "torch>=2.10",  # the first with torch.nn.functional.grouped_mm
        "numpy",
        "einops",
        "safetensors",
        "tokenizers",
        "tyro",
        "typeguard",
        "rich",
        "matplotlib",
        "jinja2>=3.1.6",  # its sandbox: older ones have known ways out
        "wandb",
        'triton; sys_platform == "linux"',  # never pinned here: a CUDA build of torch pins its own
    ],
    extras_require={
        "test": [
            "pytest", "pytest-xdist", "hypothesis", "transformers", "peft", "bitsandbytes", "nbclient", "ipykernel",
            "openai", "playwright", "math-verify", "gradio", "fastapi", "uvicorn", "markdown-it-py",
        ],
        "math": ["math-verify"],
        "chat": ["gradio", "fastapi", "uvicorn", "markdown-it-py"],
        "tasks": ["reasoning-gym"],
        "bench": ["trl", "liger-kernel", "cut-cross-entropy"],
    },
)
