from __future__ import annotations

import copy
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch.training import Alert, Event, Monitor

PROBE = torch.randn(80, 6, generator=torch.Generator().manual_seed(7))
LAYERS = ["0", "3"]


class Network(nn.Sequential):
    """Everything that a pass in the wrong mode would disturb: batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8), nn.Dropout(0.3))
        self.append(nn.Linear(8, 3))


def monitor_of(model: nn.Module, **options: Any) -> Monitor:
    return Monitor(model, PROBE, **{"layers": LAYERS, "n_basis": 8, **options})


def move(model: nn.Module, size: float = 0.3) -> None:
    """Stand in for training: a drawn step of the weights."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn_like(weight)


def train(model: nn.Module, epochs: int, monitor: Monitor | None = None) -> list[Tensor]:
    """A few epochs with everything random that a training has; returns all of its state."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for epoch in range(epochs):
        for _ in range(3):
            x = torch.randn(20, 6) + random.random() + np.random.rand()  # noqa: NPY002
            # two micro-batches: gradients accumulate around a measurement
            model(x[:10]).square().mean().backward()
            if monitor is not None:
                monitor.measure(step=epoch)
            model(x[10:]).cos().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [*model.state_dict().values(), torch.get_rng_state()]


@pytest.mark.parametrize("background", [False, True])
def test_training_is_the_same_bit_for_bit(background: bool) -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        model = Network()
        monitor = monitor_of(model, background=background) if watched else None
        results.append(train(model, 3, monitor))
        if monitor is not None:
            monitor.close()
            assert len(monitor.history) == 9
    for alone, watched_too in zip(*results, strict=True):
        assert torch.equal(alone, watched_too)


def test_scores_are_those_of_similarity() -> None:
    model = Network()
    monitor = monitor_of(model, reference="initial", measures=("heat", "overlap", "lfm", "linear_cka"))
    monitor.measure(step=0)
    before = lfm.extract(model, PROBE, layers=LAYERS)
    move(model)
    point = monitor.measure(step=1, epoch=0.5)
    after = lfm.extract(model, PROBE, layers=LAYERS)
    assert point is not None
    assert (point.step, point.epoch) == (1, 0.5)
    for layer in LAYERS:
        wanted = lfm.similarity(before[layer], after[layer], measures=monitor.settings.measures, n_basis=8)
        for measure, value in wanted.items():
            assert point.scores[layer][measure] == pytest.approx(float(value), abs=1e-4)
        # participation ratio, by the eigenvalues
        spectrum = torch.linalg.eigvalsh(after[layer].double().T.cov())
        assert point.scores[layer]["dimension"] == pytest.approx(float(spectrum.sum() ** 2 / (spectrum**2).sum()), 1e-4)


def scores_of(reference: Any, *, scores: tuple[float, ...] = (), **options: Any) -> list[float | None]:
    """Heat overlap of layer "0" along a walk there and back: states A, B, C, A."""
    model = Network()
    states = []
    for _ in range(3):
        states.append(copy.deepcopy(model.state_dict()))
        move(model)
    monitor = monitor_of(model, reference=reference, **options)
    found = []
    for i, state in enumerate((*states, states[0])):
        model.load_state_dict(state)
        point = monitor.measure(step=i, score=scores[i] if scores else None)
        assert point is not None
        found.append(point.scores["0"].get("heat"))
    return found


def test_references_that_move() -> None:
    previous = scores_of("previous")
    assert previous[0] is None
    assert all(value is not None and value < 0.99 for value in previous[1:])
    initial = scores_of("initial")
    assert initial[0] is None
    assert initial[3] == pytest.approx(1, abs=1e-3)
    # A is best until C: the return to A is compared to C
    best = scores_of("best", scores=(2.0, 3.0, 1.0, 5.0))
    assert best[0] is None
    assert best[2] is not None
    assert best[2] < 0.99
    assert best[3] < 0.99  # type: ignore[operator]
    assert scores_of("best", scores=(3.0, 1.0, 2.0, 5.0), mode="max")[3] == pytest.approx(1, abs=1e-3)


def test_references_that_stay(tmp_path: Path) -> None:
    model = Network()
    torch.save({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "last.ckpt")
    start = copy.deepcopy(model)
    given = lfm.extract(model, PROBE, layers=LAYERS)
    move(model)
    weights = copy.deepcopy(model.state_dict())
    found = []
    for reference in (tmp_path / "last.ckpt", str(tmp_path / "last.ckpt"), start, given):
        point = monitor_of(model, reference=reference).measure(step=0)
        assert point is not None
        found.append(point.scores["3"]["heat"])
    assert found == pytest.approx([found[0]] * 4, abs=1e-5)
    assert found[0] < 0.99
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_chance_is_below_what_stays_the_same() -> None:
    model = Network()
    monitor = monitor_of(model, reference="initial")
    monitor.measure(step=0)
    point = monitor.measure(step=1)
    assert point is not None
    assert monitor.chance["0"]["heat"] < 0.6 < point.scores["0"]["heat"]


def test_a_resumed_monitor_continues_the_curve(tmp_path: Path) -> None:
    curves = []
    for resumed in (False, True):
        torch.manual_seed(5)
        model, told = Network(), []
        options = {
            "reference": "initial",
            "alerts": [Alert.drift(below=1.1)],
            "on_event": told.append,
            "measures": ("heat", "linear_cka"),
        }
        monitor = monitor_of(model, **options)
        for i in range(4):
            monitor.step(epoch=i)
            move(model)
            if resumed and i == 1:
                torch.save(monitor.state_dict(), tmp_path / "state.pt")
                monitor = monitor_of(model, **options)
                monitor.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        curves.append([(row["step"], row["layer"], row["measure"], row["value"]) for row in monitor.rows()])
        # the threshold was crossed once, before the interruption
        assert len(told) == len(LAYERS)
        assert [point.step for point in monitor.history] == [1, 2, 3, 4]
    assert curves[0] == curves[1]
    other = monitor_of(model, layers="0")
    with pytest.raises(ValueError, match=r"state must be of the layers \['0'\]"):
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


class Breakable(Network):
    broken: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.broken == "raises":
            raise RuntimeError("probe failed")
        if self.broken == "nan":
            x = x / 0
        if self.broken == "equal":
            x = x * 0
        out: Tensor = super().forward(x)
        return out


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("raises", "RuntimeError: probe failed"), ("nan", "must be finite"), ("equal", r"equal ones throughout")],
)
def test_a_probe_that_fails_is_said_and_training_goes_on(kind: str, reason: str, background: bool) -> None:
    model = Breakable().train()
    monitor = monitor_of(model, background=background)
    monitor.measure(step=0)
    monitor.flush()
    model.broken = kind
    with pytest.warns(lfm.LFMWarning, match=f"not measured at step 1: .*{reason}"):  # noqa: PT031 (either may warn)
        monitor.measure(step=1)
        monitor.flush()
    assert all(module.training and not module._forward_hooks for module in model.modules())
    model.broken = None
    monitor.measure(step=2)
    monitor.close()
    assert [bool(point.failures) for point in monitor.history] == [False, True, False]
    assert "heat" not in monitor.history[1].scores.get("0", {})
    # compared to the last state that could be measured
    assert monitor.history[2].scores["0"]["heat"] == pytest.approx(1, abs=1e-3)


def test_errors_can_be_raised_and_the_first_always_is(tmp_path: Path) -> None:
    model = Breakable()
    model.broken = "raises"
    monitor = monitor_of(model, on_error="raise", directory=tmp_path)
    with pytest.raises(RuntimeError, match="probe failed"):
        monitor_of(model).measure(step=0)
    model.broken = None
    monitor.measure(step=0)
    model.broken = "nan"
    with pytest.raises(ValueError, match="must be finite"):
        monitor.measure(step=1)
    assert len(json.loads((tmp_path / "history.json").read_text())["points"]) == 1


def test_a_training_that_breaks_keeps_its_history(tmp_path: Path) -> None:
    model = Network()
    with pytest.raises(KeyboardInterrupt), monitor_of(model, directory=tmp_path, background=True) as monitor:  # noqa: PT012
        monitor.step()
        raise KeyboardInterrupt
    assert len(json.loads((tmp_path / "history.json").read_text())["points"]) == 2


def test_every_counts_steps() -> None:
    with monitor_of(Network(), every=3) as monitor:
        taken = [monitor.step() is not None for _ in range(7)]
    assert taken == [False, False, True, False, False, True, False]
    assert [point.step for point in monitor.history] == [0, 3, 6]


def test_alerts_speak_once_when_crossed() -> None:
    model, told = Network(), []

    def tell(event: Event) -> bool:
        told.append(event)
        return False

    monitor = monitor_of(model, reference="initial", alerts=[Alert.drift(below=0.9, layers="0")], on_event=tell)
    start = copy.deepcopy(model.state_dict())
    monitor.measure(step=0)
    for step in (1, 2):
        move(model, 1.0)
        monitor.measure(step=step, epoch=1)
    assert [(event.name, event.layer, event.step) for event in told] == [("drift", "0", 1)]
    assert "drift: heat of layer '0' is 0." in str(told[0])
    model.load_state_dict(start)
    monitor.measure(step=3)
    move(model, 1.0)
    monitor.measure(step=4)
    assert [event.step for event in told] == [1, 4]
    assert not monitor.should_stop


def test_collapse_and_settling_can_stop() -> None:
    model = Breakable()
    collapsing = monitor_of(model, alerts=[Alert.collapse(below=1.5, stop=True)])
    collapsing.measure(step=0)
    assert not collapsing.should_stop
    with torch.no_grad():
        model[3].weight[1:] = 0
        model[3].weight[0] = 1
    point = collapsing.measure(step=1)
    assert point is not None
    assert [(event.layer, event.stop) for event in point.events] == [("3", True)]
    assert point.events[0].value == pytest.approx(1, abs=1e-3)
    assert collapsing.should_stop
    settling = monitor_of(Network(), alerts=[Alert.settled(patience=2)], on_event=lambda event: event.name == "settled")
    for step in range(3):
        assert not settling.should_stop
        settling.measure(step=step)
    assert settling.should_stop
    assert len(settling.history[-1].events) == 1


def test_compiled_models_are_measured_inside() -> None:
    model = Network()
    compiled = torch.compile(model, backend="eager")
    inside, outside = monitor_of(model).measure(step=0), monitor_of(compiled).measure(step=0)
    assert inside is not None
    assert outside is not None
    assert inside.scores == outside.scores


@needs("matplotlib")
def test_files_and_figures(tmp_path: Path) -> None:
    model = Network()
    with monitor_of(model, directory=tmp_path) as monitor:
        move(model)
        monitor.step()
    names = {path.name for path in monitor.save()}
    assert names == {"history.json", "history.csv", "curves.png", "layers.png"}
    assert all((tmp_path / name).stat().st_size > 100 for name in names)
    table = (tmp_path / "history.csv").read_text().splitlines()
    assert table[0] == "step,epoch,layer,measure,value"
    assert len(table) == 1 + len(monitor.rows())
    matrix = monitor.layer_matrix("heat")
    assert matrix is not None
    torch.testing.assert_close(matrix.diagonal(), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "prevous"}, r"got 'prevous', which is no file; did you mean 'previous'"),
        ({"measures": ["hat"]}, "did you mean 'heat'"),
        ({"layers": "9"}, "layers must name submodules"),
        ({"on_error": "ignore"}, "on_error must be one of"),
        ({"every": 0}, "every must be between 1"),
        ({"n_bases": 3}, "an option must be one of .*did you mean 'n_basis'"),
        ({"mode": "least"}, "mode must be one of"),
        ({"pooling": "max"}, "pooling must be one of"),
    ],
)
def test_settings_are_judged_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor_of(Network(), **options)


def test_other_mistakes() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        Monitor("model", PROBE, layers="0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="reference must be a name"):
        monitor_of(Network(), reference=3)
    with pytest.raises(ValueError, match="score must be a finite number"):
        monitor_of(Network(), reference="best").measure(step=0)
    with pytest.raises(ValueError, match=r"reference must have the layers \['0', '3'\], got none of \['3'\]"):
        monitor_of(Network(), reference={"0": PROBE}).measure(step=0)
    with pytest.raises(ValueError, match="below or above must be given"):
        Alert("heat")
    with pytest.raises(ValueError, match="patience must be at least 1"):
        Alert("heat", below=0.5, patience=0)
    with pytest.raises(ValueError, match="directory must be given"):
        monitor_of(Network()).save()
    waiting = monitor_of(Network(), background=True)
    waiting.measure(step=0)
    with pytest.raises(RuntimeError, match=r"call flush\(\) on all ranks"):
        waiting.state_dict()
    waiting.close()


def test_without_matplotlib_the_history_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = Monitor(nn.Sequential(nn.Linear(4, 3)), torch.randn(80, 4), layers="0", directory=tmp_path)
    monitor.step()
    for name in ("matplotlib", "lfm_torch.report.history"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install \"lfm-torch\[cli\]\""):
        monitor.save()
    assert (tmp_path / "history.csv").stat().st_size > 0
    assert [path.name for path in monitor.save(figures=False)] == ["history.json", "history.csv"]


def test_sizes_that_the_probe_has_no_samples_for_are_cut(tmp_path: Path) -> None:
    monitor = Monitor(Network().eval(), PROBE, layers=LAYERS, reference="initial", n_basis=300)
    with pytest.warns(lfm.LFMWarning, match="Monitor: n_basis=300 does not fit 80 rows") as caught, monitor:
        monitor.step()
    assert len(caught) == 1
    written = json.loads(monitor.save(tmp_path, figures=False)[0].read_text("utf-8"))
    assert monitor.settings.n_basis == written["settings"]["n_basis"] == 79
    with Monitor(Network().eval(), PROBE[:40], layers=LAYERS, measures="heat") as monitor:
        assert monitor._tracker.last["0"].basis.n_basis == 10  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="at least 3 rows"), Monitor(Network(), PROBE[:2], layers=LAYERS):
        pass


def test_a_measure_by_another_name() -> None:
    alert = Alert("cka", below=2.0)
    with Monitor(Network(), PROBE, layers="0", measures="cka", reference="initial", alerts=[alert]) as monitor:
        point = monitor.step()
    assert point is not None
    assert [event.measure for event in point.events] == ["linear_cka"]
    assert torch.equal(monitor.layer_matrix("cka"), monitor.layer_matrix("linear_cka"))  # type: ignore[arg-type]


@pytest.mark.parametrize("background", [False, True])
def test_what_is_to_be_said_of_a_layer_is_said_once(background: bool) -> None:
    """Of a training whose dead samples change in number from step to step."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
    monitor = Monitor(model, PROBE, layers="1", n_basis=8, background=background)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(4):
            with torch.no_grad():
                model[0].bias.fill_(-0.8 - 0.1 * step)
            monitor.measure(step=step)
        monitor.close()
    assert [point.notes["1"].partition(" rows are zero")[1] != "" for point in monitor.history] == [True] * 4
    assert len({point.notes["1"] for point in monitor.history}) > 1
    (one,) = found
    assert one.category is lfm.LFMWarning
    assert str(one.message).startswith("Monitor: notes on 1 of 1 layers at step 0, the first: '1': ")
    monitor.load_state_dict(monitor.state_dict())
    assert monitor.history[0].notes


def test_a_reference_of_arrays_and_one_that_is_not_pooled() -> None:
    network = Network().eval()
    found = lfm.extract(network, PROBE, layers=LAYERS)
    arrays: Any = {layer: x.numpy() for layer, x in found.items()}
    with Monitor(network, PROBE.numpy(), layers=LAYERS, reference=arrays, measures="heat") as monitor:
        assert monitor.history[0].scores["0"]["heat"] == pytest.approx(1, abs=1e-3)
    maps = {layer: x.unsqueeze(2).expand(-1, -1, 4) for layer, x in found.items()}
    with pytest.raises(
        ValueError, match=r"reference\['0'\] must have shape \[n, d\], a row per sample, got \[80, 16, 4\]"
    ):
        Monitor(network, PROBE, layers=LAYERS, reference=maps).__enter__()
