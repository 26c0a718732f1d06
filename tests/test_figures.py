import re
from io import BytesIO

import numpy as np
import PIL.Image
import pytest

from samlib.analysis import figures


def drawn(caption="digits; ρ = 0.1; 3 seeds"):
    figure, axes = figures.figure(1, 2, height=2.4)
    for mix in ("sgd", "sam", "scale2x0.5", "shuffled-scale2x0.5"):
        axes[0, 0].plot(range(3), np.arange(3) + len(mix), **figures.look(mix))
    axes[0, 0].set_title("test accuracy, %")
    figures.legend(figure)
    return figures.describe(figure, "Curves of SGD, SAM & SANER. They rise.", caption)


def test_a_saved_figure_is_svg_and_png_with_its_alternative_text(tmp_path):
    figures.save(drawn(), "a", tmp_path)
    text = (tmp_path / "a.svg").read_text()
    assert "<title>Curves of SGD, SAM &amp; SANER</title>" in text
    assert "<desc>Curves of SGD, SAM &amp; SANER. They rise.</desc>" in text and 'role="img">' in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figures.save(drawn(), "b", tmp_path)
    assert (tmp_path / "b.svg").read_text() == text  # no date, no random ids


def test_a_relative_folder_is_the_callers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures.save(drawn(), "a", "deep/figures")
    assert {path.name for path in (tmp_path / "deep/figures").iterdir()} == {"a.svg", "a.png"}


def test_a_figure_without_alternative_text_is_not_saved(tmp_path):
    figure, _ = figures.figure()
    with pytest.raises(ValueError, match="alternative text"):
        figures.save(figure, "a", tmp_path)
    figures.save(figures.describe(figure, "Empty axes"), "a", tmp_path)
    assert "<desc>Empty axes</desc>" in (tmp_path / "a.svg").read_text()


def test_a_shown_figure_carries_its_alternative_text_and_is_small():
    data, metadata = figures.show(drawn())._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == "Curves of SGD, SAM & SANER. They rise."
    assert metadata["image/png"]["width"] == 864 and len(data["image/png"]) < 100_000


def test_a_figure_of_many_mixes_keeps_their_colours_in_the_few_of_its_png():
    drawn, [[axes]] = figures.figure(height=6)
    every = [mix for mix in figures.LOOKS for _ in range(2 if mix == "magnitude" else 30)]
    for k, mix in enumerate(every):  # one of them seldom
        style = figures.look(mix, linestyle="", markersize=4)
        axes.plot(np.linspace(0, 1, 40), np.full(40, k), alpha=0.7, **style)
        axes.plot([1.1], [k], **style)
    figures.describe(drawn, "Every mix")
    whole = BytesIO()
    drawn.savefig(whole, format="png", dpi=figures.DPI)
    full, few = (np.asarray(PIL.Image.open(f).convert("RGB")) for f in (whole, BytesIO(figures.png(drawn))))
    for color, _, _ in figures.LOOKS.values():
        own = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
        there = (full == own).all(-1)
        assert there.any() and abs(few[there].astype(int) - own).max() < 10, color


def test_a_figure_is_readable_and_what_is_not_is_named():
    assert figures.faults(drawn("a caption much longer than one line; " * 8)) == []
    figure = drawn()
    figure.text(0.99, 0.5, "too far right", fontsize=9)
    figure.text(0.5, 0.5, "tiny", fontsize=6)
    assert figures.faults(figure) == ["'too far right' is off the frame", "'tiny' has 6 points"]


def test_mixes_are_told_apart_without_colour():
    looks = [figures.look(mix) for mix in figures.LOOKS]
    for key in ("color", "linestyle", "marker"):
        assert len({str(look[key]) for look in looks if look["label"] != "inactive"}) == len(looks) - 1
    control = figures.look("shuffled-scale2x0.5")
    assert control["marker"] == figures.look("scale2x0.5")["marker"] and control["fillstyle"] == "none"
    assert len({figures.look(mix)["fillstyle"] for mix in ("shuffled-sam", "rescaled-sam", "length-sam")}) == 3
    assert re.fullmatch("SANER, shuffled", control["label"])
