"""Pictures from JSON as the benchmarks write it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PNG = b"\x89PNG\r\n\x1a\n"
FOUND = {
    "kernels": {
        "gpu": "one", "read_bytes_per_s": 4.4e12,
        "rows": [
            {"shape": "8 x 32768", "kernel": "decode", "bytes": 8_000_000, "seconds": 2e-6},
            {"shape": "8 x 32768", "kernel": "not installed", "failed": "no module"},
            {"shape": "8 rows", "kernel": "plan", "bytes": 0, "seconds": 1e-6},
        ],
    },
    "step": [
        {"model": "8b", "batch": 8, "context": 8192, "ratio": 1.1,
         "one": {"step": 5.0, "attention": 1.0}, "split": {"step": 5.5, "attention": 2.0}},
    ],
    "growth": {
        "model": "8b", "batch": 32,
        "rows": [
            {"stage": {"nodes": 1, "context": 8350, "p50": 12.0, "p99": 12.9}, "this_card": 11.8,
             "own_cards": 12.0},
            {"stage": {"nodes": 2, "context": 16540, "p50": 20.0, "p99": 21.5}, "this_card": 19.9,
             "own_cards": 12.3},
        ],
    },
    "poller": {"flag to send": {"p50": 0.5, "p99": 6.7, "max": 900.0}},
    "scale": {"0 standby": [{"READY": 200.0, "first token stored": 400.0}, {"READY": 300.0}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def plots():
    path = Path(__file__).parents[2] / "bench" / "plots.py"
    spec = importlib.util.spec_from_file_location("plots", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def axes_of(plots, name):
    figure, axes = plots.plt.subplots()
    plots.PLOTS[name](FOUND[name], axes)
    plots.plt.close(figure)
    return axes


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_every_kind_of_result_becomes_a_picture_beside_it(plots, tmp_path, monkeypatch, capsys):
    for name, found in FOUND.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path)])
    assert plots.main() == 0
    drawn = capsys.readouterr().out.split()
    assert drawn == [str(tmp_path / f"{name}.png") for name in FOUND]
    assert all(Path(path).read_bytes().startswith(PNG) for path in drawn)


def test_kernels_are_drawn_as_shares_of_the_bandwidth_and_failures_left_out(plots):
    axes = axes_of(plots, "kernels")
    assert labels(axes) == ["decode, 8 x 32768"]
    assert axes.patches[0].get_width() == pytest.approx(8e6 / 2e-6 / 4.4e12)


def test_a_split_step_shows_how_long_it_waited_and_the_ratio(plots):
    axes = axes_of(plots, "step")
    assert [patch.get_width() for patch in axes.patches] == [5.0, 5.5, 2.0]
    assert [text.get_text() for text in axes.texts] == [" 1.10 x"]


def test_growth_draws_what_was_measured_and_both_models_over_the_context(plots):
    axes = axes_of(plots, "growth")
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {
        "p50": [12.0, 20.0], "p99": [12.9, 21.5], "model, this card": [11.8, 19.9],
        "model, own cards": [12.0, 12.3],
    }  # fmt: skip
    assert [list(line.get_xdata()) for line in axes.lines] == [[8350, 16540]] * 4
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8350\n1 nodes", "16540\n2 nodes"]


def test_phases_of_a_scale_out_are_medians_with_the_worst(plots):
    axes = axes_of(plots, "scale")
    assert labels(axes) == ["0 standby: READY", "0 standby: first token stored"]
    assert [patch.get_width() for patch in axes.patches] == [250.0, 400.0]
    (lines,) = axes.collections
    assert [segment[1][0] for segment in lines.get_segments()] == [300.0, 400.0]


def test_a_file_that_is_not_ours_and_an_empty_folder_are_named(plots, tmp_path, monkeypatch, capsys):
    (tmp_path / "step.json").write_text('[{"model": "8b"}]')
    with pytest.raises(ValueError, match=r"step\.json is not as bench/ writes it: KeyError\('one'\)"):
        plots.draw(tmp_path / "step.json")
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / "none")])
    assert plots.main() == 2 and "kernels.json" in capsys.readouterr().err
