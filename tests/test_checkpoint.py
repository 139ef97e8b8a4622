"""checkpoint.py: what is left after a kill at any moment, the two pointers, damaged files."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minir1 import checkpoint
from minir1.log import open_run


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
    del loaded["sha256"]
    assert torch.equal(loaded.pop("moments"), torch.full((64,), 120.0))
    assert loaded == {"step": 120, "betas": (0.9, 0.95), "names": ["w", None]}


def test_a_folder_of_checkpoints_is_resolved(tmp_path, capsys):
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(tmp_path, "best") == tmp_path  # a Hugging Face folder
    checkpoint.save(tmp_path, 1, write, state(1))
    assert checkpoint.resolve(tmp_path) == tmp_path / "step-000001" and capsys.readouterr().out == ""
    assert checkpoint.resolve(tmp_path, "best") == tmp_path / "step-000001"
    assert capsys.readouterr().out == (
        f"{tmp_path} has no best checkpoint: the latest is used, step-000001\n"
    )
    checkpoint.save(tmp_path, 2, write, state(2), best=True)
    checkpoint.save(tmp_path, 3, write, state(3))
    assert checkpoint.resolve(tmp_path) == tmp_path / "step-000003"
    assert checkpoint.resolve(tmp_path, "best") == tmp_path / "step-000002" and capsys.readouterr().out == ""


def test_the_folder_of_a_run_stands_for_its_checkpoints(tmp_path):
    checkpoint.save(tmp_path / "run" / "checkpoint", 1, write, state(1), best=True)
    checkpoint.save(tmp_path / "run" / "checkpoint", 2, write, state(2))
    (tmp_path / "run" / "config.json").write_text("{}")  # of the run, not of a model
    assert checkpoint.resolve(tmp_path / "run").name == "step-000002"
    assert checkpoint.resolve(tmp_path / "run", "best").name == "step-000001"


def test_a_run_before_its_first_checkpoint_is_named(tmp_path):
    """Not as a folder whose config.json names no architecture; in a model's own folder a run may have begun."""

    @dataclass
    class Config:
        steps: int = 3

    out = tmp_path / "rl"
    open_run(out, Config()).start().close()
    (out / "checkpoint").mkdir()
    (out / "checkpoint" / "latest").write_text("none\n")  # as `save` does before it writes the first
    for prefer in ("latest", "best"):
        for folder in (out, out / "checkpoint"):
            with pytest.raises(ValueError, match=f"^{folder}: this run has saved no checkpoint yet$"):
                checkpoint.resolve(folder, prefer)
    (out / "model.safetensors").write_text("")
    assert checkpoint.resolve(out) == out


def test_the_folder_of_the_demonstration_stands_for_its_last_run(tmp_path):
    for step, name in enumerate(("rl", "base"), start=1):
        checkpoint.save(tmp_path / name / "checkpoint", step, write, state(step))
    assert checkpoint.resolve(tmp_path) == tmp_path / "rl" / "checkpoint" / "step-000001"
    assert checkpoint.resolve(tmp_path, "best") == tmp_path / "rl" / "checkpoint" / "step-000001"
    (tmp_path / "model.safetensors").write_text("")  # a model in whose folder somebody trains
    assert checkpoint.resolve(tmp_path) == tmp_path


def test_the_folder_of_a_pipeline_is_refused_with_its_stages(tmp_path):
    for name, seconds in (("base", 1), ("rl-2", 3), ("sft-1", 2)):
        checkpoint.save(tmp_path / name / "checkpoint", 1, write, state(1))
        os.utime(tmp_path / name / "checkpoint" / "latest", (seconds, seconds))
    (tmp_path / "config.json").write_text("{}")  # of the pipeline
    for prefer in ("latest", "best"):
        with pytest.raises(ValueError, match=f"such as {tmp_path}/rl-2 \\(there are base, sft-1, rl-2\\)$"):
            checkpoint.resolve(tmp_path, prefer)
    (tmp_path / "model.safetensors").write_text("")
    assert checkpoint.resolve(tmp_path) == tmp_path


def test_a_path_that_is_no_folder_is_refused_with_what_makes_one(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"^{path} is no folder: .* `python -m experiments.pretrain` makes$"):
            checkpoint.resolve(path)


def test_latest_and_best_are_kept(tmp_path):
    for step in range(6):
        checkpoint.save(tmp_path, step, write, state(step), best=step == 2)
    assert names(tmp_path) == ["best", "latest", "step-000002", "step-000005"]
    assert checkpoint.best(tmp_path).name == "step-000002" and checkpoint.latest(tmp_path).name == "step-000005"


@pytest.mark.parametrize("how", ["resume", "save"])
def test_what_a_kill_left_is_deleted_and_what_is_named_stays(tmp_path, how):
    """Half-written, half-deleted, not yet named, no longer needed."""
    checkpoint.save(tmp_path, 10, write, state(10), best=True)
    checkpoint.save(tmp_path, 20, write, state(20))
    for name in ("step-000005", "step-000030", "step-000030.tmp-77", "step-000020.tmp-old", "step-000015.tmp-deleted"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    found = [checkpoint.load_state(find(tmp_path))["step"] for find in (checkpoint.best, checkpoint.latest)]
    assert found == [10, 20]
    if how == "resume":
        assert checkpoint.resume(tmp_path) == tmp_path / "step-000020"
        assert names(tmp_path) == ["best", "latest", "step-000010", "step-000020"]
    else:
        checkpoint.save(tmp_path, 30, write, state(30))
        assert names(tmp_path) == ["best", "latest", "step-000010", "step-000030"]


def test_nothing_to_resume_from(tmp_path):
    assert checkpoint.resume(tmp_path / "none") is checkpoint.resume(tmp_path) is None
    (tmp_path / "latest").write_text("none\n")  # killed before the first checkpoint was named
    checkpoint.save(tmp_path / "other", 1, write, state(1)).rename(tmp_path / "step-000001")
    assert checkpoint.latest(tmp_path) is checkpoint.resume(tmp_path) is None
    assert names(tmp_path) == ["latest", "other"]


def test_checkpoints_without_a_pointer_are_refused_with_what_to_do(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, write, state(step), best=step == 1)
    (tmp_path / "latest").unlink()
    advice = f"^{tmp_path}/latest is missing: write step-000002 into it to continue from that checkpoint$"
    for act in (checkpoint.latest, checkpoint.resolve, checkpoint.resume):
        with pytest.raises(ValueError, match=advice):
            act(tmp_path)
    assert names(tmp_path) == ["best", "step-000001", "step-000002"]
    (tmp_path / "latest").write_text("step-000002")
    assert checkpoint.resume(tmp_path).name == "step-000002"


@pytest.mark.parametrize(
    "name, folder", [("step-000009", False), ("step-abc", True), ("step-²²²²²²", True), ("step-000009.tmp-1", False)]
)
def test_what_is_no_checkpoint_is_named_at_a_resume_and_hurts_no_save(tmp_path, name, folder):
    checkpoint.save(tmp_path, 1, write, state(1))
    (tmp_path / name).mkdir() if folder else (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is no checkpoint: move it elsewhere")):
        checkpoint.resume(tmp_path)
    assert checkpoint.resolve(tmp_path).name == "step-000001"
    if ".tmp-" not in name:
        checkpoint.save(tmp_path, 2, write, state(2))
        assert names(tmp_path) == ["latest", "step-000002", name]


def test_a_changed_file_of_the_model_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, write, state(1))
    (path / "README.md").write_text("not read")
    digests = checkpoint.load_state(path)["sha256"]
    assert digests["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert digests.keys() == {"model.safetensors", "nested/tokenizer.json"}
    checkpoint.verify(path, digests)
    for file in map(path.joinpath, digests):
        whole = file.read_bytes()
        for change in (lambda: file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:]), file.unlink):
            change()
            with pytest.raises(ValueError, match=f"^{file} has changed since the run saved its digest: put the old"):
                checkpoint.verify(path, digests)
        file.write_bytes(whole)
    checkpoint.verify(path, digests)


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


@pytest.mark.parametrize("text", ["step-000002\n", "", "..\n", "step-000001.tmp-7\n", "step-²²²²²²", "stép\n"])
def test_a_pointer_to_no_checkpoint_is_an_error(tmp_path, text):
    checkpoint.save(tmp_path, 1, write, state(1), best=True)
    (tmp_path / "step-000001.tmp-7").mkdir()
    for find, name in [(checkpoint.latest, "latest"), (checkpoint.best, "best")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError) as error:
            find(tmp_path)
        assert str(tmp_path / name) in str(error.value) and repr(text.strip()) in str(error.value)


def test_a_pointer_that_is_no_text_file_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, write, state(1), best=True)
    for find, name in [(checkpoint.latest, "latest"), (checkpoint.best, "best")]:
        (tmp_path / name).write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=f"{tmp_path / name} names .*, which is no checkpoint"):
            find(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{tmp_path / name} is a folder: it must be a file that names a"):
            find(tmp_path)


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


def test_a_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step is -1"):
        checkpoint.save(tmp_path, -1, write, {})
