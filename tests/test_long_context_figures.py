"""experiments/studies/long_context_figures.py: the contents of the panels and the headlines."""

import pytest

from experiments.studies import long_context_figures as figures


def result(shift=0.0):
    values = {"window": 64}
    for n, name in enumerate(figures.VARIANTS):
        values |= {f"{name}/{length}/{part}": 0.1 * n + shift for length in (32, 64, 128) for part in range(4)}
        values |= {f"{name}/inside": 1.0, f"{name}/outside": 0.1 * n + shift}
    return values


def test_retrieval_draws_the_mean_of_the_seeds(tmp_path):
    figure = figures.retrieval([result(), result(0.2)], tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert [panel.get_title(loc="left") for panel in figure.axes] == list(figures.VARIANTS.values())
    for n, panel in enumerate(figure.axes):
        (image,) = panel.get_images()
        assert image.get_array().shape == (4, 3)  # parts down, lengths across
        assert image.get_array().ravel().tolist() == pytest.approx([0.1 * n + 0.1] * 12)
        assert panel.lines[0].get_xdata()[0] == 1.5  # between 64 and 128
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "Retrieval beyond the trained window: 10%, with YaRN 40%, tuned 60%"
    assert "mean of 2 seeds" in words[1] and words[1].endswith("Tuned without YaRN: 50%")


def test_the_headline_of_the_costs_compares_the_longest(tmp_path):
    values = {}
    for kind, factor in (("mla", 1), ("gqa", 2), ("mha", 4)):
        for length in (1024, 2048):
            values |= {f"decode/{kind}/{length}/ms": length * factor / 1000, f"cache/{kind}/{length}/mib": factor}
    figure = figures.costs(values, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 10_000
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "Memory of the cache: 25% of MHA's with MLA, 50% with GQA"
    assert words[1].startswith("At 2,048 tokens a step takes 0.25 of MHA's time with MLA, 0.50 with GQA")
    decode = {tuple(line.get_ydata()) for line in figure.axes[0].lines}
    assert decode == {(1.024, 2.048), (2.048, 4.096), (4.096, 8.192)}
