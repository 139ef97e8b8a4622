"""settings.py: the numbers in a Config, refused with field, value and what is allowed."""

from types import SimpleNamespace

import pytest

from minir1.settings import at_least, fraction, same_steps

CONFIG = SimpleNamespace(steps=0, prompts=3, share=1.5, part=0.5, nan=float("nan"))


def test_at_least_names_the_first_field_that_is_below():
    at_least(CONFIG, 0, "steps", "prompts")
    with pytest.raises(ValueError, match="^steps = 0: at least 1$"):
        at_least(CONFIG, 1, "prompts", "steps")
    with pytest.raises(ValueError, match="^nan = nan: at least 0$"):
        at_least(CONFIG, 0, "nan")


def test_fraction_is_zero_to_one():
    fraction(CONFIG, "part", "steps")
    for name in ("share", "nan"):
        with pytest.raises(ValueError, match=f"^{name} = .*: 0 to 1$"):
            fraction(CONFIG, "part", name)


def test_a_run_resumes_with_its_own_number_of_steps():
    same_steps(9, 9)
    with pytest.raises(ValueError, match="^steps = 12: the learning rate follows it, so this run resumes with 9 only$"):
        same_steps(12, 9)
