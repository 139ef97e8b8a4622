"""What must be set before the first import of triton, transformers or matplotlib in the test process."""
import os
import shutil
from importlib.util import find_spec

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads each on two cores slow each other tenfold
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; with a GPU the real compiler runs them
os.environ.pop("MINIR1_KERNELS", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tensors here are tiny and many threads only wait for each other.
torch.set_num_threads(min(2, torch.get_num_threads()))
if not (find_spec("triton") and find_spec("minir1.kernels")):  # the latter is a link, which some checkouts lack
    collect_ignore_glob = ["test_kernels_*.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped without")
    config.addinivalue_line("markers", "multigpu: needs two GPUs; skipped with fewer")
    config.addinivalue_line("markers", "first: takes long, so it runs first: no worker waits for it at the end")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    needed = {"gpu": (1, "needs CUDA"), "multigpu": (2, "needs two GPUs")}
    for marker, (gpus, reason) in needed.items():
        for item in items if torch.cuda.device_count() < gpus else ():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    """toy_base("moe") or ("dense"): the run folder of a toy base, trained when first asked for."""
    from dataclasses import replace

    from toys import BASE, DENSE, MOE

    from experiments import pretrain

    made = {}

    def base(kind: str = "moe"):
        if kind not in made:
            out = tmp_path_factory.mktemp(f"toy-{kind}")
            pretrain.main(replace(BASE, model={"moe": MOE, "dense": DENSE}[kind], out=out))
            made[kind] = out
        return made[kind]

    return base


@pytest.fixture(scope="module")
def server(toy_base):
    """A server of a toy model, with a seed whose answer has thinking."""
    from served import PROMPT, Running, answers_of, thinks

    from minir1 import checkpoint

    running = Running(checkpoint.resolve(toy_base("moe")), rows=16, waiting=64, max_tokens=48)
    running.seed = next(seed for seed in range(99) if thinks(answers_of(running, PROMPT, seed=seed)[0]))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The folder of a model whose answers never end."""
    from talker import saved

    folder = tmp_path_factory.mktemp("endless")
    return saved(folder, {"\nAssistant:": "7", "7": "8", "8": "7"}, window=100_000)


@pytest.fixture(scope="module")  # playwright's event loop must not outlive the tests that need it
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium; CHROMIUM may name its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
