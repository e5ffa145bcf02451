from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from extras import needs, reason
from terminals import unwrapped
from torch import Tensor

from lfm_torch import LFMWarning
from lfm_torch.comparison.result import Comparison
from lfm_torch.comparison.run import compare

pytest.importorskip("jinja2", reason=reason("jinja2"))
pytest.importorskip("matplotlib", reason=reason("matplotlib"))
pytest.importorskip("rich", reason=reason("rich"))
from lfm_torch.report.figures import checkpoint_figure, layer_figure, save_figures, trajectory_figure
from lfm_torch.report.html import render
from lfm_torch.report.progress import ProgressBars
from lfm_torch.report.scales import Scale, labelled_steps, line_colors, name_of, scale_of, shown_chance, step_positions
from lfm_torch.report.summary import as_json
from lfm_torch.report.terminal import print_pair, print_summary

EVIL = "<script>alert(1)</script>"


def cloud(seed: int) -> Tensor:
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    networks = {
        f"seed{seed}/epoch={step}": {EVIL: cloud(seed) + step * cloud(9), "$x_1$": cloud(9) + cloud(seed + 20)}
        for seed in range(2)
        for step in (0, 1, 30)
    }
    networks["[red]broken[/red]"] = {EVIL: torch.full((50, 4), float("nan"))}
    with pytest.warns(LFMWarning):
        return compare(networks, n_basis=6, n_neighbors=8)


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "poster") and value:
                self.addresses.append(value)
            if name == "title" and value:
                self.titles.append(value)
            assert not name.startswith("on")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escapes_every_name(comparison: Comparison) -> None:
    page = Page(render(comparison))
    assert page.tags.count("script") == 3  # its own: for sorting, for the landscape, and the landscape's numbers
    assert all(address.startswith("data:") or address == "similarity.csv" for address in page.addresses)
    text = render(comparison)
    assert EVIL not in text
    assert EVIL in page.text
    assert not re.search(r"url\(|@import|https?://", text)


def test_values_can_be_read_from_the_page(comparison: Comparison) -> None:
    page = Page(render(comparison))
    value = float(comparison.between_layers("lfm")[0, 1])
    assert any(title.startswith(f"{EVIL} → $x_1$: {value:.4f}, ") for title in page.titles)
    value = float(comparison.between_checkpoints("heat")[0, 4])
    assert any(title.startswith(f"seed0/epoch=0 → seed1/epoch=1: {value:.4f}, ") for title in page.titles)
    step = comparison.trajectories("overlap")[1].values[1, 0]
    assert f"seed1, {EVIL}, 1: {float(step):.4f}" in page.text


def test_failures_settings_and_chance_are_on_the_page(comparison: Comparison) -> None:
    text = Page(render(comparison)).text
    assert "[red]broken[/red]" in text
    assert "must be finite, got nan in row 0" in text
    assert "angular" in text
    assert torch.__version__ in text
    assert f"Shuffled rows: {float(comparison.chance['lfm'].mean()):.3f}" in text


def test_a_single_layer_without_training_makes_a_smaller_page(tmp_path: Path) -> None:
    comparison = compare({"a": cloud(1), "b": cloud(2)}, n_basis=5, n_neighbors=8)
    text = Page(render(comparison)).text
    assert "Along training" not in text
    assert "Layer by layer" not in text
    assert trajectory_figure(comparison) is None
    (tmp_path / "trajectory.png").write_bytes(b"of an earlier report")
    assert [path.name for path in save_figures(comparison, tmp_path)] == ["checkpoints.png"]
    assert not (tmp_path / "trajectory.png").exists()


def test_many_checkpoints_become_a_picture() -> None:
    many = compare({f"m{k}": cloud(k) for k in range(64)}, n_basis=4, n_neighbors=6, measures=["heat"])
    page = Page(render(many))
    assert page.addresses[-1] == "similarity.csv"
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses[:-1])


def test_figures_show_the_matrices(comparison: Comparison) -> None:
    for figure, view in [
        (layer_figure(comparison), comparison.between_layers),
        (checkpoint_figure(comparison), comparison.between_checkpoints),
    ]:
        images = [image for ax in figure.axes for image in ax.get_images()]
        assert len(images) == 3
        for image, measure in zip(images, comparison.measures, strict=True):
            torch.testing.assert_close(torch.as_tensor(image.get_array()), view(measure))
    figure = trajectory_figure(comparison)
    assert figure is not None
    styles = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].get_lines()[:4]}
    assert len(styles) == 2  # two layers, told apart without colour; the same in both runs


def test_report_writes_its_files(comparison: Comparison, tmp_path: Path) -> None:
    page = comparison.report(tmp_path / "new" / "folder")
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"report.html", "similarity.csv", "layers.png", "checkpoints.png", "trajectory.png"}
    assert (page.parent / "layers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"format must be one of 'csv', 'parquet', got 'xlsx'"):
        comparison.report(tmp_path, format="xlsx")  # type: ignore[arg-type]


@needs("pandas", "pyarrow")
def test_the_table_of_a_report_can_be_parquet(comparison: Comparison, tmp_path: Path) -> None:
    comparison.report(tmp_path, format="parquet")
    assert (tmp_path / "similarity.parquet").exists()


def test_steps_are_placed_and_labelled() -> None:
    assert step_positions([2, 0, 1, 2]) == {0: 0.0, 1: 1.0, 2: 2.0}
    assert step_positions([0, 1, 3, 15]) == {0: 0.0, 1: 1.0, 3: 2.0, 15: 4.0}
    assert step_positions([-1, 1, 3, 15])[15] == 15.0  # no logarithm of what comes before 0
    assert labelled_steps({step: float(step) for step in range(101)}, gap=50) == [0, 50, 100]
    assert labelled_steps({0: 0.0, 9: 9.0, 10: 10.0}, gap=2) == [0, 10]
    assert labelled_steps({7: 7.0}, gap=0) == [7]


def test_an_axis_has_a_length_where_every_value_is_one() -> None:
    alike = {f"run/epoch={step}": cloud(1) for step in range(3)}
    comparison = compare(alike, measures=["overlap"], n_basis=1, n_neighbors=8)
    assert bool((comparison.matrix("overlap") > 0.9999).all())
    assert "Along training" in Page(render(comparison)).text


@pytest.mark.parametrize("value", [1.0, 1.0000001, 0.9999999])
def test_an_axis_ends_at_one_however_float32_rounds(value: float) -> None:
    alike = {f"run/epoch={step}": cloud(1) for step in range(3)}
    comparison = compare(alike, measures=["overlap"], n_basis=1, n_neighbors=8)
    matrices = {"overlap": torch.full_like(comparison.matrix("overlap"), value)}
    page = render(dataclasses.replace(comparison, matrices=matrices))
    labels = re.findall(r"<text[^>]*>\s*([01]\.\d)\s*</text>", page)
    assert labels == ["0.8", "0.9", "1.0"]
    # the line is where the label of 1 is, not above it
    assert "40.0,12.0 193.0,12.0 346.0,12.0" in page


def test_scales_cover_the_values_with_readable_ink(comparison: Comparison) -> None:
    scale = scale_of(comparison, "lfm")
    assert scale.low <= float(comparison.matrix("lfm").min())
    assert Scale(0.0, 0.1).color(0.0) == "#440154"
    assert Scale(0.0, 0.1).color(1.0) == "#fde725"
    assert (Scale(0.0, 0.1).ink(0.0), Scale(0.0, 0.1).ink(1.0)) == ("#fff", "#000")
    assert len(set(line_colors(7))) == 7
    assert len(set(line_colors(20))) == 20


def test_the_summary_fits_a_screen_and_takes_names_literally(
    comparison: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(comparison, ["out/report.html"])
    shown = capsys.readouterr().out
    assert "[red]broken[/red]" in shown
    assert "out/report.html" in shown
    matching = comparison.layer_matching("heat")
    assert matching is not None
    assert f"{round(4 * matching.accuracy)} of 4: {matching.accuracy:.0%}" in shown
    assert len(shown.splitlines()) < 40
    content = as_json(comparison)
    assert content["measures"]["heat"]["layer_matching"]["accuracy"] == matching.accuracy
    assert content["failures"][0]["checkpoint"] == "[red]broken[/red]"


@pytest.mark.parametrize("width", [25, 40, 60, 80, 200])
def test_no_value_is_cut_however_narrow_the_terminal(
    width: int, comparison: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_summary(dataclasses.replace(comparison, failures=()))
    keys = ("similarity", "reverse", "low", "high", "shuffled_rows", "shuffled_rows_std", "z", "p")
    numbers = dict(zip(keys, (0.91234, 0.81, 0.8, 0.987, 0.3, 0.02, 12.3, 0.01), strict=True))
    print_pair("x.npy", "y.npy", 50, {"heat": numbers, "lfm_paper": dict.fromkeys(keys)})
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    found = unwrapped(shown)
    for name in comparison.measures:
        matching = comparison.layer_matching(name)
        assert matching is not None
        ends = torch.stack([trajectory.values[[0, -1]].mean(1) for trajectory in comparison.trajectories(name)]).mean(0)
        values = [matching.same_layer, matching.other_layer, *ends.tolist()]
        same = f"{round(4 * matching.accuracy)} of 4: {matching.accuracy:.0%}"
        for text in (*name_of(name).split(), same, shown_chance(comparison, name), *(f"{v:.3f}" for v in values)):
            assert text in found
    for text in ("0.9123", "0.8100", "0.800 to 0.987", "0.300 ± 0.020", "12.3", "0.01"):
        assert text in found


@pytest.mark.parametrize("width", [40, 80])
def test_progress_is_told_in_whole_numbers(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("COLUMNS", str(width)), ("TERM", "xterm"), ("FORCE_COLOR", "1"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with ProgressBars() as bars:
        bars("pairs", 50_000, 120_000)
    shown = capsys.readouterr().err
    assert "comparing pairs" in shown
    assert " 50000/120000 " in shown
    assert "…" not in shown


def test_a_measure_below_chance_is_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    base = torch.randn(240, 6, generator=torch.Generator().manual_seed(0))
    networks = {f"m{k}": base.tanh() + 0.3 * base.roll(k, 1) for k in range(3)}
    with pytest.warns(LFMWarning, match="lfm_paper"):
        found = compare(networks, measures=["lfm_paper", "heat"], n_neighbors=12, n_basis=10)
    print_summary(found)
    assert "wrong side of chance" in unwrapped(capsys.readouterr().out)
    assert render(found).count("wrong side of chance") == 1
    told = {name: measure["below_chance"] for name, measure in as_json(found)["measures"].items()}
    assert told == {"lfm_paper": True, "heat": False}
