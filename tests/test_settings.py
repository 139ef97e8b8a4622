"""settings.py: the values in a Config, refused with field, value and what is allowed; and every script's Config."""

import importlib
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_origin, get_type_hints

import pytest

from minir1.settings import (
    above,
    at_least,
    below_folders,
    fraction,
    new_file,
    new_folder,
    no_training,
    same_steps,
    zero_or_at_least,
)

NAN, INF = float("nan"), float("inf")
CONFIG = SimpleNamespace(
    steps=0, prompts=3, share=1.5, part=0.5, nan=NAN, inf=INF, huge=2**63, none=None, seeds=(2, 0), empty=(),
    pair=((1, 2), (0, 3)),
)  # fmt: skip


def test_at_least_names_the_first_field_that_is_below():
    at_least(CONFIG, 0, "steps", "prompts", "none", "seeds", "pair")
    with pytest.raises(ValueError, match="^steps = 0: at least 1$"):
        at_least(CONFIG, 1, "prompts", "steps")
    for name in ("nan", "empty"):
        with pytest.raises(ValueError, match=f"^{name} = .*: at least 0$"):
            at_least(CONFIG, 0, name)


def test_above_excludes_the_bound():
    above(CONFIG, 0, "prompts", "part", "none")
    for name in ("steps", "nan", "seeds", "pair"):
        with pytest.raises(ValueError, match=f"^{name} = .*: above 0$"):
            above(CONFIG, 0, name)


@pytest.mark.parametrize("check", [at_least, above])
@pytest.mark.parametrize("name", ["inf", "huge"])
def test_infinity_and_integers_beyond_64_bits_are_too_large(check, name):
    with pytest.raises(ValueError, match=rf"^{name} = .*: too large, below 2\^63$"):
        check(CONFIG, 0, name)


def test_fraction_is_zero_to_one():
    fraction(CONFIG, "part", "steps")
    for name in ("share", "nan"):
        with pytest.raises(ValueError, match=f"^{name} = .*: 0 to 1$"):
            fraction(CONFIG, "part", name)


def test_a_new_file_lies_in_a_folder_that_can_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    for path in (None, tmp_path / "file", tmp_path / "new", tmp_path / "folder" / "new"):
        new_file(SimpleNamespace(out=path), "out")
    for path in (tmp_path, tmp_path / "file" / "new", tmp_path / "file" / "folder" / "new"):
        with pytest.raises(ValueError, match=f"^out = {path}: name a file"):
            new_file(SimpleNamespace(out=path), "out")
    monkeypatch.setattr("os.access", lambda folder, mode: folder != tmp_path)
    with pytest.raises(ValueError, match="^out = .*new: name a file, in a folder that can be written to$"):
        new_file(SimpleNamespace(out=tmp_path / "new"), "out")


def test_a_new_folder_is_no_file(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (None, tmp_path, tmp_path / "new"):
        new_folder(SimpleNamespace(out=path), "out")
    with pytest.raises(ValueError, match=f"^out = {tmp_path}/file is a file: choose a folder$"):
        new_folder(SimpleNamespace(out=tmp_path / "file"), "out")


def test_the_folder_of_a_training_is_not_written_to(tmp_path):
    for path in (None, tmp_path, tmp_path / "new"):
        no_training(SimpleNamespace(out=path), "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^out = {tmp_path} holds a training, whose result.json would be lost"):
        no_training(SimpleNamespace(out=tmp_path), "out")


def test_zero_or_at_least_excludes_what_lies_between():
    config = SimpleNamespace(zero=0.0, hot=1e-6, several=(0.0, 1.0), cold=1e-9, nan=NAN, mixed=(1.0, 1e-9))
    zero_or_at_least(config, 1e-6, "zero", "hot", "several")
    for name in ("cold", "nan", "mixed"):
        with pytest.raises(ValueError, match=f"^{name} = .*: 0, or at least 1e-06$"):
            zero_or_at_least(config, 1e-6, name)


def test_a_path_below_a_file_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    for path in (None, tmp_path, tmp_path / "file", tmp_path / "new" / "folder"):
        below_folders(SimpleNamespace(out=path), "out")
    for path in (tmp_path / "file" / "new", tmp_path / "file" / "new" / "folder", Path("/dev/null/x")):
        with pytest.raises(ValueError, match=f"^out = {path}: .*(file|null) is no folder that can be written to$"):
            below_folders(SimpleNamespace(out=path), "out")
    monkeypatch.setattr("os.access", lambda folder, mode: folder != tmp_path)
    with pytest.raises(ValueError, match=f"^out = {tmp_path}/new: {tmp_path} is no folder that can be written to$"):
        below_folders(SimpleNamespace(out=tmp_path / "new"), "out")


def test_a_run_resumes_with_its_own_number_of_steps():
    same_steps(9, 9)
    with pytest.raises(ValueError, match="^steps = 12: the learning rate follows it, so this run resumes with 9 only$"):
        same_steps(12, 9)
    with pytest.raises(ValueError, match="^steps = 12: the last ones differ, so this run resumes with 9 only$"):
        same_steps(12, 9, "the last ones differ")


# ---- every script's Config ---------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
SENSELESS = {int: (-1, 0, 2**63), float: (NAN, INF, -INF, -1.0)}
ALLOWED = {  # what is senseless elsewhere and has a meaning here, which the comment beside the field states
    "seed": {0}, "seeds": {0}, "warmup": {0}, "value_warmup": {0}, "value_clip": {INF}, "reference_reset": {0},
    "lora_rank": {0}, "few_shot": {0}, "past": {0}, "whole": {0}, "double": {0}, "limits": {0}, "waits": {0},
    "thinking": {0}, "turns": {0}, "port": {0}, "store_steps": {0},
}  # fmt: skip
REQUIRED = {"checkpoint": Path("x"), "policy": Path("x"), "base": Path("x"), "model": "deepseek-v3", "name": "rloo",
            "a": Path("x"), "b": Path("y"), "run": Path("x"), "out": Path("nosuch"), "teacher": Path("x"),
            "teachers": (Path("x"),), "pipelines": (Path("x"),), "data": (Path("x"),)}  # fmt: skip


def configs() -> dict[str, type]:
    """Module and name -> the dataclass that a script reads its options into, and those that it contains."""
    found = {}
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for entry in re.findall(r"^    cli\.run\(main, (\w+)", path.read_text(encoding="utf-8"), re.M):
            config = getattr(importlib.import_module(name), entry)
            found[f"{config.__module__}.{entry}"] = config
    return found


def number(hint) -> type | None:
    """int or float, if a field of this type holds such numbers: also several of them, or None."""
    if hint in (int, float) or get_origin(hint) is dict:  # a task checks what is in its mix
        return hint
    return next(filter(None, map(number, get_args(hint))), None)


def test_every_script_reads_its_options_through_cli_run():
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"tyro\.cli\(|argparse", text), path
        if "sys.argv" not in text and "__main__" in text and path.stem != "file_map":  # which has no options
            assert re.search(r'^if __name__ == "__main__":\n    cli\.run\(main, ', text, re.M), path
    assert len(configs()) >= 30


@pytest.mark.parametrize("name", configs())
def test_no_field_takes_a_senseless_number(name):
    config, hints = configs()[name], get_type_hints(configs()[name])
    default = config(**{f.name: REQUIRED[f.name] for f in fields(config) if f.default is f.default_factory is MISSING})
    taken = []
    for field in fields(config):
        kind, several = number(hints[field.name]), isinstance(getattr(default, field.name), tuple)
        for bad in SENSELESS.get(kind, ()):
            if bad in ALLOWED.get(field.name, ()):
                continue
            try:
                replace(default, **{field.name: nested(getattr(default, field.name), bad) if several else bad})
                taken.append((field.name, bad))
            except ValueError as error:
                assert str(error).startswith(f"{field.name} = "), error
    assert not taken, f"{name} takes {taken}: check the field in __post_init__, or state here why it may"


@pytest.mark.parametrize("name", configs())
def test_what_a_script_cannot_write_to_is_refused_before_its_work(name, tmp_path):
    """A file where it makes a folder, or a folder where it writes a file; a run does it in `open_run`."""
    config = configs()[name]
    given = {f.name: REQUIRED[f.name] for f in fields(config) if f.default is f.default_factory is MISSING}
    source = Path(importlib.import_module(config.__module__).__file__).read_text(encoding="utf-8")
    if "out" in {f.name for f in fields(config)} and "open_run(config.out" not in source:
        (tmp_path / "file").write_text("old")
        with pytest.raises(ValueError, match="^out = "):
            for path in (tmp_path / "file", tmp_path):
                config(**given | {"out": path})


@pytest.mark.parametrize("name", ["budget", "evaluate", "preference_pairs", "reject_sample"])
def test_no_script_that_writes_a_result_of_its_own_takes_the_folder_of_a_training(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a training, whose result.json would be lost"):
        configs()[f"experiments.{name}.Config"](out=tmp_path)


def test_no_script_takes_a_temperature_that_the_sampler_refuses():
    asked = 0
    for name, config in configs().items():
        default = {f.name: REQUIRED[f.name] for f in fields(config) if f.default is f.default_factory is MISSING}
        if "temperature" in {f.name for f in fields(config)}:
            with pytest.raises(ValueError, match="^temperature = 1e-09: "):
                config(**default, temperature=1e-9)
            asked += 1
    assert asked >= 20


def nested(value: tuple, bad: float) -> tuple:
    """`value` with its first number replaced."""
    return (nested(value[0], bad) if isinstance(value[0], tuple) else bad, *value[1:])
