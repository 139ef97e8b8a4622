"""Which module may import which, checked on the sources: an import inside a function counts like any other.

    kernels <- ops <- model <- sample <- rollout <- judge, policy, monitor <- experiments

with `speculative`, which samples too, between sample and rollout.
"""
import ast
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

CHAIN = ("kernels", "ops", "model", "sample", "speculative", "rollout", "judge", "experiments")
BELOW_SAMPLE = {
    "tokenizer", "templates", "data", "preference_data", "chat_data", "log", "seed", "settings", "checkpoint",
    "optim", "chat_template", "device", "memory", "files", "figures", "cli", "workers", "sandbox", "sandboxed",
    "text_files", "text_data", "text_stream", "tokenizer_training", "conversation", "ranks", "distributed",
    "sharded_state", "plan", "faults",
}
BESIDE_JUDGE = {"policy", "monitor", "curriculum", "answer_file", "rollout_file", "engine"}
TORCH_ONLY = {"enumeration", "advantages", "losses", "reduction", "preference", "distill"}
NO_TORCH = {"tasks", "rewards", "metrics", "diagnosis", "answer_text", "address", "gpus", ""}  # "": __init__.py
DEPENDENCIES = {
    "torch", "numpy", "einops", "safetensors", "tokenizers", "tyro", "rich", "matplotlib", "jinja2",
}
LAZY = {"wandb", "triton", "math_verify", "pyarrow", "gradio", "fastapi", "uvicorn", "reasoning_gym"}  # in functions


class Import(NamedTuple):
    name: str  # dotted and absolute, as far as it may be a module
    lazy: bool  # inside a function
    line: int


def imports(path: Path, module: str) -> list[Import]:
    """Every import of a file: `from a import b` as both a and a.b, relative ones made absolute."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    result = []

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            result.extend(Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(start + (node.module.split(".") if node.module else []))
            result.append(Import(base, lazy, node.lineno))
            result.extend(Import(f"{base}.{alias.name}", lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
                result.append(Import(node.args[0].value, lazy, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return result


def sources(root: Path) -> dict[Path, str]:
    """path -> dotted module name; kernels/ under the name it is imported by."""
    modules = {}
    for prefix in ("minir1.kernels", "minir1", "experiments"):
        folder = prefix.split(".")[-1]
        for path in sorted((root / folder).rglob("*.py")):
            inside = path.relative_to(root / folder)
            if (folder, inside.parts[0]) != ("minir1", "kernels"):
                parts = [*prefix.split("."), *inside.with_suffix("").parts]
                modules[path] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return modules


def layer(module: str) -> str | None:
    """'minir1.model.hf' -> 'model', 'minir1' -> '', 'experiments.demo' -> 'experiments', 'numpy' -> None."""
    head, *rest = module.split(".")
    if head == "experiments":
        return head
    return (rest[0] if rest else "") if head == "minir1" else None


def height(name: str) -> float:
    """Position in the chain; what only has to be below `sample` is level with `model`; the rest is free."""
    if name in BELOW_SAMPLE:
        name = "model"
    if name in BESIDE_JUDGE:
        name = "judge"
    return CHAIN.index(name) if name in CHAIN else math.nan


def rules(here: str, imported: Import, there: str | None):
    """What is wrong with one import, in layer `here`, of something in layer `there` (None: not ours)."""
    top = imported.name.split(".")[0]
    if top == "kernels":
        yield "'kernels' is a package of Hugging Face; ours is minir1.kernels"
    if there == "kernels" and here != "kernels" and (here != "ops" or not imported.lazy):
        yield "kernels are imported in minir1/ops, inside a function, and nowhere else"
    if here == "experiments":  # where a script may compose others, and compare with any package
        return
    if there == "experiments":
        yield "nothing imports experiments"
    elif there is not None:
        if here == "kernels" and there != "kernels":
            yield "kernels import nothing of minir1"
        elif height(there) > height(here):
            yield f"{here} is below {there}"
        elif here == "ops" and there not in ("", "ops", "kernels"):
            yield f"ops stands on kernels only, not on {there}"
        elif here in TORCH_ONLY:
            yield f"{here} imports torch only"
    elif top not in sys.stdlib_module_names:
        if here == "kernels":
            if top not in ("torch", "triton"):
                yield f"kernels import torch and triton, not {top}"
        elif here in TORCH_ONLY:
            if top != "torch":
                yield f"{here} imports torch only, not {top}"
        elif top in LAZY:
            if not imported.lazy:
                yield f"{top} is imported inside a function only"
        elif top not in DEPENDENCIES:
            yield f"{top} is not a dependency of the library"


def breaches(root: Path) -> list[str]:
    """Every broken rule, as 'file:line: what'."""
    modules = sources(root)
    placed = {*CHAIN, *BELOW_SAMPLE, *BESIDE_JUDGE, *TORCH_ONLY, *NO_TORCH}
    layers = placed | {layer(module) for module in modules.values()}
    needs = {}  # module -> what it imports
    wrong = []
    for path, module in modules.items():
        here, name = layer(module), path.relative_to(root).as_posix()
        if here not in placed:
            wrong.append(f"{name}:1: say in tests/test_layers.py on which layer '{here}' stands")
        needs[module] = {x.name for x in imports(path, module)}
        for x in imports(path, module):
            there = layer(x.name)
            if there is not None and there not in layers and x.name.count(".") == 1:
                there = ""  # `from minir1 import __version__`
            wrong.extend(f"{name}:{x.line}: {what}" for what in rules(here, x, there))
    for path, module in modules.items():
        if layer(module) in NO_TORCH and (way := way_to_torch(module, needs)):
            wrong.append(f"{path.relative_to(root).as_posix()}:1: no torch, but {' -> '.join(way)}")
    return list(dict.fromkeys(wrong))  # `from a import b` was read as both a and a.b


def way_to_torch(module: str, needs: dict[str, set[str]]) -> list[str] | None:
    """The imports that lead from a module to torch, through others of minir1 and the packages they lie in."""
    ways, reached = [[module]], {module}
    for way in ways:
        packages = {way[-1].rsplit(".", i)[0] for i in range(1, way[-1].count(".") + 1)}
        for name in sorted(needs.get(way[-1], set()) | (packages & needs.keys())):
            if name.split(".")[0] == "torch":
                return [*way, "torch"]
            if name not in reached:
                reached.add(name)
                ways.append([*way, name])
    return None


# ---------------------------------------------------------------- this tree


def test_this_tree():
    assert breaches(ROOT) == []


def test_nothing_anywhere_imports_a_package_called_kernels():
    for path in (ROOT / "tests").glob("*.py"):
        assert not [i for i in imports(path, path.stem) if i.name.split(".")[0] == "kernels"], path


def test_kernels_folder():
    """A relative link, and no package: see setup.py."""
    link = ROOT / "minir1" / "kernels"
    if not link.is_symlink():
        pytest.skip("a checkout without links")
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_import_of_the_package_brings_no_torch():
    code = "import minir1, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- made-up trees

GOOD = {
    "kernels/logprob.py": "import torch\nimport triton\nimport triton.language as tl",
    "minir1/__init__.py": "__version__ = '0'",
    "minir1/ops/__init__.py": "import os\nimport torch\ndef f():\n    from minir1.kernels.logprob import g",
    "minir1/model/__init__.py": "from minir1.model.gqa import G",
    "minir1/model/gqa.py": "from einops import rearrange\nfrom .. import ops\nfrom . import config",
    "minir1/model/config.py": "from dataclasses import dataclass",
    "minir1/tokenizer.py": "import tokenizers",
    "minir1/log.py": "from minir1 import __version__\ndef f():\n    import wandb",
    "minir1/sample.py": "from minir1 import model, seed, tokenizer",
    "minir1/seed.py": "import torch",
    "minir1/rollout.py": "from minir1.sample import generate",
    "minir1/judge.py": "from minir1.rollout import collect\nfrom minir1.tasks import verify",
    "minir1/losses.py": "import math\nimport torch",
    "minir1/rewards.py": "from minir1.tasks.countdown import verify",
    "minir1/tasks/__init__.py": "",
    "minir1/tasks/countdown.py": "import random",
    "minir1/tasks/math.py": "import math\ndef f():\n    import math_verify",
    "experiments/demo.py": "import torch, tyro, transformers\nfrom minir1 import judge, losses, model",
    "experiments/studies/clip.py": "import demo\nfrom minir1 import losses",
}

BAD = [  # file, what is appended, the breach
    ("minir1/ops/__init__.py", "from minir1 import model", "minir1/ops/__init__.py:5: ops is below model"),
    ("minir1/ops/__init__.py", "from minir1.losses import nll", "ops stands on kernels only, not on losses"),
    ("minir1/ops/__init__.py", "import minir1.kernels.logprob", "kernels are imported in minir1/ops, inside"),
    ("minir1/model/gqa.py", "from minir1.sample import f", "gqa.py:4: model is below sample"),
    ("minir1/model/gqa.py", "from ..sample import f", "gqa.py:4: model is below sample"),
    ("minir1/model/gqa.py", "def f():\n    from .. import rollout", "gqa.py:5: model is below rollout"),
    ("minir1/model/gqa.py", "import importlib as i\ni.import_module('minir1.sample')", "gqa.py:5: model is"),
    ("minir1/model/gqa.py", "def f():\n    import minir1.kernels.logprob", "and nowhere else"),
    ("minir1/model/gqa.py", "import transformers", "transformers is not a dependency"),
    ("minir1/model/gqa.py", "def f():\n    import accelerate", "accelerate is not a dependency"),
    ("minir1/sample.py", "import trl.trainer", "trl is not a dependency"),
    ("minir1/sample.py", "from minir1 import rollout", "sample is below rollout"),
    ("minir1/rollout.py", "from minir1 import judge", "rollout is below judge"),
    ("minir1/judge.py", "from experiments.demo import main", "judge.py:3: nothing imports experiments"),
    ("kernels/logprob.py", "from experiments import demo", "nothing imports experiments"),
    ("experiments/demo.py", "from minir1.kernels.logprob import f", "kernels are imported in minir1/ops"),
    ("experiments/demo.py", "from kernels.logprob import f", "'kernels' is a package of Hugging Face"),
    ("minir1/seed.py", "from minir1.rollout import f", "seed is below rollout"),
    ("minir1/tokenizer.py", "from minir1.sample import f", "tokenizer is below sample"),
    ("minir1/losses.py", "import numpy", "losses imports torch only, not numpy"),
    ("minir1/losses.py", "from minir1.ops import linear_logprob", "losses imports torch only"),
    ("minir1/losses.py", "from . import reduction", "losses imports torch only"),
    ("minir1/reduction.py", "from einops import reduce", "reduction imports torch only, not einops"),
    ("minir1/tasks/countdown.py", "import torch.nn", "no torch, but minir1.tasks.countdown -> torch"),
    ("minir1/tasks/countdown.py", "from minir1.seed import f", "countdown -> minir1.seed -> torch"),
    ("minir1/tasks/math.py", "def f():\n    import torch", "no torch, but minir1.tasks.math -> torch"),
    ("minir1/tasks/__init__.py", "import torch", "no torch, but minir1.rewards -> minir1.tasks"),
    ("minir1/__init__.py", "from minir1.ops import f", "__init__.py:1: no torch, but minir1 -> minir1.ops"),
    ("minir1/log.py", "import wandb", "log.py:4: wandb is imported inside a function only"),
    ("minir1/log.py", "class A:\n    import wandb", "log.py:5: wandb is imported inside a function only"),
    ("minir1/tasks/math.py", "import math_verify", "math_verify is imported inside a function only"),
    ("minir1/ops/__init__.py", "import triton", "triton is imported inside a function only"),
    ("kernels/logprob.py", "from minir1 import ops", "kernels import nothing of minir1"),
    ("kernels/logprob.py", "import numpy", "kernels import torch and triton, not numpy"),
    ("minir1/serve.py", "", "minir1/serve.py:1: say in tests/test_layers.py on which layer 'serve' stands"),
]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


def test_a_good_tree_passes(tmp_path):
    assert breaches(plant(tmp_path, GOOD)) == []


def test_an_empty_tree_passes(tmp_path):
    assert breaches(tmp_path) == []


@pytest.mark.parametrize("file, line, breach", BAD)
def test_every_rule_can_be_broken(tmp_path, file, line, breach):
    files = {**GOOD, file: "\n".join(filter(None, (GOOD.get(file, ""), line)))}
    broken = breaches(plant(tmp_path, files))
    assert any(breach in x for x in broken), broken
