"""checkpoint.py: what is left after a kill at any moment, the two pointers, damaged files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import Killed

from minir1 import checkpoint


def write(path: Path) -> None:
    """Stands for the Hugging Face folder."""
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "nested").mkdir()
    (path / "nested" / "tokenizer.json").write_text("{}")


def state(step: int) -> dict:
    return {"step": step, "moments": torch.full((64,), float(step)), "betas": (0.9, 0.95), "names": ["w", None]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_and_load(tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    assert checkpoint.latest(folder) is checkpoint.best(folder) is None
    path = checkpoint.save(folder, 120, write, state(120))
    assert path == folder / "step-000120" == checkpoint.latest(folder)
    assert checkpoint.best(folder) is None
    assert names(folder) == ["latest", "step-000120"]
    assert names(path) == ["model.safetensors", "nested", "training_state.pt"]
    assert (folder / "latest").read_text() == "step-000120\n"
    loaded = checkpoint.load_state(path)
    assert torch.equal(loaded.pop("moments"), torch.full((64,), 120.0))
    assert loaded == {"step": 120, "betas": (0.9, 0.95), "names": ["w", None]}


def test_a_folder_of_checkpoints_is_resolved(tmp_path):
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(tmp_path, "best") == tmp_path  # a Hugging Face folder
    checkpoint.save(tmp_path, 1, write, state(1))
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(tmp_path, "best") == tmp_path / "step-000001"
    checkpoint.save(tmp_path, 2, write, state(2), best=True)
    checkpoint.save(tmp_path, 3, write, state(3))
    assert checkpoint.resolve(tmp_path) == tmp_path / "step-000003"
    assert checkpoint.resolve(tmp_path, "best") == tmp_path / "step-000002"


def test_the_folder_of_a_run_stands_for_its_checkpoints(tmp_path):
    checkpoint.save(tmp_path / "run" / "checkpoint", 1, write, state(1), best=True)
    checkpoint.save(tmp_path / "run" / "checkpoint", 2, write, state(2))
    (tmp_path / "run" / "config.json").write_text("{}")  # of the run, not of a model
    assert checkpoint.resolve(tmp_path / "run").name == "step-000002"
    assert checkpoint.resolve(tmp_path / "run", "best").name == "step-000001"


def test_a_path_that_is_no_folder_is_refused_with_what_makes_one(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"^{path} is no folder: .* `python -m experiments.pretrain` makes$"):
            checkpoint.resolve(path)


def test_latest_best_and_the_newest_are_kept(tmp_path):
    for step in range(6):
        checkpoint.save(tmp_path, step, write, state(step), best=step == 2)
    assert names(tmp_path) == ["best", "latest", "step-000002", "step-000005"]
    assert checkpoint.best(tmp_path).name == "step-000002" and checkpoint.latest(tmp_path).name == "step-000005"
    for step in range(6, 10):
        checkpoint.save(tmp_path, step, write, state(step), best=step == 6, keep=3)
    assert names(tmp_path) == ["best", "latest", *(f"step-00000{step}" for step in (6, 7, 8, 9))]


def test_steps_beyond_a_resumed_one_are_deleted(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, write, state(step), keep=5)
    checkpoint.save(tmp_path, 15, write, state(15), keep=5)
    assert names(tmp_path) == ["latest", "step-000010", "step-000015"]
    assert checkpoint.latest(tmp_path).name == "step-000015"


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, write, state(1))
    checkpoint.save(tmp_path, 1, write, state(100), best=True)
    assert names(tmp_path) == ["best", "latest", "step-000001"]
    assert checkpoint.load_state(checkpoint.best(tmp_path))["step"] == 100


def test_an_error_while_writing_leaves_the_last_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, write, state(1))

    def torn(path):
        write(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 2, torn, state(2), best=True)
    assert checkpoint.latest(tmp_path).name == "step-000001" and checkpoint.best(tmp_path) is None
    assert any(".tmp-" in name for name in names(tmp_path))
    checkpoint.save(tmp_path, 3, write, state(3))
    assert names(tmp_path) == ["latest", "step-000003"]


@pytest.mark.parametrize("call", range(30))
def test_a_kill_at_any_call_leaves_both_pointers_whole(tmp_path, monkeypatch, call):
    """Stop `save` at its n-th call into the file system, for every n, then look and save again."""
    checkpoint.save(tmp_path, 1, write, state(1), best=True)
    count = 0

    def dying(function):
        def inner(*args, **kwargs):
            nonlocal count
            count += 1
            if count > call:
                raise Killed
            return function(*args, **kwargs)

        return inner

    with monkeypatch.context() as patch:
        for owner, name in [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "mkdir"), (torch, "save")]:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        patch.setattr(checkpoint.shutil, "rmtree", dying(checkpoint.shutil.rmtree))
        try:
            checkpoint.save(tmp_path, 2, write, state(2), best=True)
            died = False
        except Killed:
            died = True
    assert died == (count > call) and not (died and call == 29)  # 29 is past the last call
    for find in (checkpoint.latest, checkpoint.best):
        path = find(tmp_path)
        assert checkpoint.load_state(path)["step"] == int(path.name[5:])
        assert (path / "nested" / "tokenizer.json").exists()
    checkpoint.save(tmp_path, 3, write, state(3), best=True)
    assert names(tmp_path) == ["best", "latest", "step-000003"]


def test_a_process_killed_while_saving(tmp_path):
    code = (
        "import os, signal, sys, torch\nfrom pathlib import Path\nfrom minir1 import checkpoint\n"
        "def killed(path):\n    (path / 'model').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder = Path(sys.argv[1])\n"
        "checkpoint.save(folder, 1, lambda path: None, {'w': torch.ones(3)})\n"
        "checkpoint.save(folder, 2, killed, {'w': torch.zeros(3)})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert torch.equal(checkpoint.load_state(checkpoint.latest(tmp_path))["w"], torch.ones(3))
    assert len(names(tmp_path)) == 3 and any(name.startswith("step-000002.tmp-") for name in names(tmp_path))


@pytest.mark.parametrize("text", ["step-000002\n", "", "..\n", "step-000001.tmp-7\n"])
def test_a_pointer_to_no_checkpoint_is_an_error(tmp_path, text):
    checkpoint.save(tmp_path, 1, write, state(1), best=True)
    (tmp_path / "step-000001.tmp-7").mkdir()
    for find, name in [(checkpoint.latest, "latest"), (checkpoint.best, "best")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError) as error:
            find(tmp_path)
        assert str(tmp_path / name) in str(error.value) and repr(text.strip()) in str(error.value)


def test_a_missing_or_damaged_state_names_the_file(tmp_path):
    path = checkpoint.save(tmp_path, 1, write, state(1))
    file = path / "training_state.pt"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(torch.full((4,), 1.0).numpy().tobytes())] ^= 1  # one bit of one number
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(flipped), b"\0" * len(whole)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut short or damaged") as error:
            checkpoint.load_state(path)
        assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(ValueError, match="does not exist") as error:
        checkpoint.load_state(path)
    assert str(file) in str(error.value)


def test_a_state_that_could_not_be_loaded_is_refused_when_saved(tmp_path):
    checkpoint.save(tmp_path, 1, write, state(1))
    with pytest.raises(ValueError, match="more than tensors and plain Python values"):
        checkpoint.save(tmp_path, 2, write, {"out": Path("runs/x")})
    assert checkpoint.latest(tmp_path).name == "step-000001"


@pytest.mark.parametrize("step, keep", [(-1, 1), (1, 0)])
def test_bad_arguments(tmp_path, step, keep):
    with pytest.raises(ValueError, match=f"step is {step} and keep is {keep}"):
        checkpoint.save(tmp_path, step, write, {}, keep=keep)
