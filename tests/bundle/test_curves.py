"""The picture of a run: which series are in it, and that no history breaks it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from PIL import Image

from vlm_sft.bundle.curves import draw_curves, learning_rates


def step(number, **more):
    row = {"step": number, "loss": 2.0 / number, "token_accuracy": 0.5, "tokens_per_second": 9e3,
           "data_wait_share": 0.01, "learning_rate": 1e-3}  # fmt: skip
    return row | more


HISTORIES = {
    "empty": [],
    "one": [step(1)],
    "few": [step(n) for n in (1, 2, 3)] + [{"step": 3, "eval_loss": 0.5, "eval_loss_own_image": 0.5}],
    "many": [step(n, learning_rate_lora=1e-4, learning_rate_projector=1e-3) for n in range(1, 400)],
    "zero": [step(1, loss=0.0, tokens_per_second=0.0)],
    "evaluated before the first step": [{"step": 0, "eval_loss": 2.0}, step(1)],
    "nothing finite": [step(1, loss=float("nan")), step(2, loss=float("inf")), step(3)],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_gives_a_picture(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_curves(HISTORIES[name], tmp_path / "curves.png", title="阶段一 stage 1")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_no_marker_is_cut_and_steps_are_whole_numbers(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    draw_curves([step(3, loss=4.0)], tmp_path / "curves.png")
    loss, *_, throughput, _ = figures[0].axes
    assert loss.get_ylim()[1] > 4.0 and throughput.get_ylim()[1] > 9e3
    assert all(place == int(place) for place in loss.xaxis.get_major_locator().tick_values(2.85, 3.15))


def test_a_chinese_title_is_written_in_a_chinese_font_where_there_is_one(monkeypatch, tmp_path):
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    families = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, fontfamily, **kwargs: families.append(fontfamily))
    for there in (["DejaVu Sans"], ["DejaVu Sans", "Noto Sans CJK SC", "SimHei"]):
        monkeypatch.setattr(font_manager.fontManager, "get_font_names", lambda there=there: there)
        draw_curves([], tmp_path / "curves.png", title="阶段一")
    assert families == [["DejaVu Sans"], ["DejaVu Sans", "Noto Sans CJK SC", "SimHei"]]


def test_learning_rates_are_told_apart_by_part_where_they_are_logged():
    assert learning_rates(HISTORIES["few"]) == [("learning_rate", "")]
    assert learning_rates([]) == [("learning_rate", "")]
    assert learning_rates(HISTORIES["many"]) == [
        ("learning_rate_lora", "lora"),
        ("learning_rate_projector", "projector"),
    ]


def test_drawing_leaves_a_notebooks_backend_alone(tmp_path):
    program = (
        "import sys; from vlm_sft.bundle.curves import draw_curves; draw_curves([], sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "c.png")], check=True)
