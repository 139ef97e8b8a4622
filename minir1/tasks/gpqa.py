"""GPQA: questions by domain experts, hard even with a search engine (Rein et al. 2023, arXiv:2311.12022).

The files are read as published, gpqa_diamond.csv, gpqa_main.csv and gpqa_extended.csv; they are the variants. Each is
a test set only. The file lists the right choice first: a stable hash of the question shuffles them.
"""

from pathlib import Path

from minir1.tasks import Problem, share
from minir1.tasks.multiple_choice import filled, final, problem, verify  # noqa: F401
from minir1.tasks.published import KINDS, records

SPLITS = ("test",)
VARIANTS = ("diamond", "main", "extended")
DATA = "GPQA's folder with gpqa_diamond.csv, gpqa_main.csv and gpqa_extended.csv, or one of these files"
NEED = "the columns Question, Correct Answer, Incorrect Answer 1, Incorrect Answer 2 and Incorrect Answer 3"
CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def problems(split: str, data: str | Path, variant: str = "diamond") -> list[Problem]:
    """All problems of a file, or of the folder's file of the variant. ValueError for files that are missing or differ.

    subject: the high-level domain; level: the writer's estimate, such as "Hard undergraduate level".
    """
    path = Path(data)
    if path.is_dir():
        files = [file for kind in KINDS for file in path.glob(f"gpqa_{variant}{kind}*")]
        if len(files) != 1:
            raise ValueError(f"{path} holds {len(files)} files gpqa_{variant}: give {DATA}")
        path = files[0]
    return filled(data, split, [_read(where, record) for where, record in records(path)])


def _read(where: str, record: dict) -> Problem:
    question = record.get("Question")
    order = sorted(range(4), key=lambda i: share(f"choice {i} of {question}"))
    level = str(record.get("Writer's Difficulty Estimate") or "").partition(" (")[0].strip()
    return problem(
        where,
        NEED,
        question,
        [record.get(CHOICES[i]) for i in order],
        order.index(0),
        level=level or "default",
        subject=str(record.get("High-level domain") or "").strip(),
        solution=str(record.get("Explanation") or "").strip(),
        extra={"subdomain": str(record.get("Subdomain") or "").strip()},
    )
