from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset, WeightedRandomSampler

from lfm_torch.representations.extraction import extract


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), nn.ReLU(inplace=True)])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def network() -> Network:
    model = Network()
    # a mixed state: what comes back must be exactly this, not just .train()
    model.train()
    model.layers[0][1].eval()
    return model


IMAGES = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(1))


class Odd(nn.Module):
    """Returns its input wrapped, transposed or spoilt."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change
        self.inner = nn.Identity()
        self.outer = Wrapped(change)

    def forward(self, x: Tensor) -> Any:
        return self.outer(self.inner(x))


class Wrapped(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x)


def test_values_are_those_of_the_forward_pass(network: Network) -> None:
    found = extract(network, IMAGES, layers=["layers.0", "head"], batch_size=3)
    network.eval()
    first = network.layers[0](IMAGES)
    torch.testing.assert_close(found["layers.0"], first.mean((2, 3)))
    torch.testing.assert_close(found["head"], network(IMAGES))
    assert not found["head"].requires_grad


def test_a_layer_before_an_inplace_one_keeps_its_own_output(network: Network) -> None:
    for pooling in ("mean", "flatten"):
        found = extract(network, IMAGES, layers="layers.0", pooling=pooling)["layers.0"]
        assert bool((found < 0).any())


def test_flatten_and_token_pooling() -> None:
    tokens = torch.randn(4, 5, 6)
    torch.testing.assert_close(extract(Odd(lambda x: x), tokens, layers="inner")["inner"], tokens.mean(1))
    flat = extract(Odd(lambda x: x), tokens, layers="inner", pooling="flatten")["inner"]
    torch.testing.assert_close(flat, tokens.flatten(1))


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: {"a": None, "b": x}, lambda x: [(x,)]])
def test_the_first_tensor_of_a_container_is_taken(wrap: Any) -> None:
    x = torch.randn(4, 5)
    torch.testing.assert_close(extract(Odd(wrap), x, layers="outer")["outer"], x)


def test_globs_take_one_part_of_a_name_and_keep_the_order_of_the_model(network: Network) -> None:
    assert list(extract(network, IMAGES, layers=["head", "layers.*"])) == ["layers.0", "layers.1", "head"]
    assert list(extract(network, IMAGES, layers="layers.**")) == ["layers.0", "layers.0.0", "layers.0.1", "layers.1"]


@pytest.mark.parametrize("kind", ["tuple", "dataset", "loader", "array", "double"])
def test_kinds_of_data(network: Network, kind: str) -> None:
    labels = torch.zeros(10)
    data = {
        "tuple": (IMAGES, labels),
        "dataset": TensorDataset(IMAGES, labels),
        "loader": DataLoader(TensorDataset(IMAGES, labels), batch_size=4),
        "array": IMAGES.numpy(),
        "double": IMAGES.double(),
    }[kind]
    wanted = extract(network, IMAGES, layers="head")["head"]
    torch.testing.assert_close(extract(network, data, layers="head", batch_size=4)["head"], wanted)


def test_batches_that_are_dicts_are_passed_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, *, values: Tensor) -> Tensor:
            return self.linear(values)

    model, x = Named(), torch.randn(6, 3)
    loader = DataLoader([{"values": row} for row in x], batch_size=4)
    torch.testing.assert_close(extract(model, loader, layers="linear")["linear"], model.linear(x).detach())


def test_layers_by_type_and_by_a_mixture(network: Network) -> None:
    assert list(extract(network, IMAGES, layers=nn.Conv2d)) == ["layers.0.0"]
    assert list(extract(network, IMAGES, layers=["head", nn.ReLU])) == ["layers.1", "head"]
    with pytest.raises(ValueError, match="got Conv3d; the model has 'layers'"):
        extract(network, IMAGES, layers=nn.Conv3d)
    with pytest.raises(TypeError, match=r"subclasses of torch.nn.Module, got <class 'int'>"):
        extract(network, IMAGES, layers=int)  # type: ignore[arg-type]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        return {"logits": self.body(self.embed(input_ids))}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_no_token(side: str) -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    model = Tokens()
    tokens = model.embed(ids).detach()
    real = [row[keep.bool()] for row, keep in zip(tokens, mask, strict=True)]
    probe = {"input_ids": ids, "attention_mask": mask}
    wanted = {"mean": [r.mean(0) for r in real], "cls": [r[0] for r in real], "last": [r[-1] for r in real]}
    for pooling, rows in wanted.items():
        found = extract(model, probe, layers="embed", pooling=pooling, batch_size=1)["embed"]  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.stack(rows))


def test_tokens_where_there_are_none(network: Network) -> None:
    with pytest.raises(ValueError, match=r"'layers.0', whose output \[10, 3, 4, 4\] has no tokens.*got 'cls'"):
        extract(network, IMAGES, layers="layers.0", pooling="cls")


def test_columns_must_fit() -> None:
    ids = torch.ones(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"one n, at least 1, got \{'input_ids': \[3, 2\], 'attention_mask': \[2, 2\]"):
        extract(Tokens(), {"input_ids": ids, "attention_mask": ids[:2]}, layers="embed")
    with pytest.raises(TypeError, match="'text': list"):
        extract(Tokens(), {"text": ["a"]}, layers="embed")


def test_a_folder_holds_what_memory_would(network: Network, tmp_path: Path) -> None:
    wanted = extract(network, IMAGES, layers="layers.*")
    found = extract(network, IMAGES, layers="layers.*", batch_size=3, store=tmp_path)
    torch.testing.assert_close(found, wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.0.npy", "layers.1.npy"]
    found["layers.0"].zero_()
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "layers.0.npy")), wanted["layers.0"])
    half = extract(network, IMAGES, layers="head", dtype=torch.float16, store=tmp_path)["head"]
    assert half.dtype == torch.float16
    with pytest.raises(TypeError, match=r"npy file, got torch.bfloat16"):
        extract(network, IMAGES, layers="head", dtype=torch.bfloat16, store=tmp_path)


def test_dtype_and_store(network: Network) -> None:
    found = extract(network, IMAGES, layers="head", dtype=torch.bfloat16, store="cpu")["head"]
    assert found.dtype == torch.bfloat16
    assert extract(network.double(), IMAGES, layers="head")["head"].dtype == torch.float64
    with pytest.raises(TypeError, match=r"dtype must be None.*got torch.int32"):
        extract(network, IMAGES, layers="head", dtype=torch.int32)


def test_widths_that_change_from_batch_to_batch() -> None:
    class Ragged(Odd):
        def forward(self, x: Tensor) -> Any:
            return self.outer(x[:, : int(x[0, 0])])

    with pytest.raises(ValueError, match=r"'outer' must have as many features in every batch, 1 in the first, got 2"):
        extract(Ragged(lambda x: x), torch.tensor([[1.0, 1.0], [2.0, 2.0]]), layers="outer", batch_size=1)


def test_a_compiled_model_is_run_without_its_wrapper(network: Network) -> None:
    wanted = extract(network, IMAGES, layers=["layers.0", "head"])
    outside = torch.compile(network, backend="eager")
    torch.testing.assert_close(extract(outside, IMAGES, layers=["layers.0", "head"]), wanted)
    network.layers[0] = torch.compile(network.layers[0], backend="eager")
    network.compile(backend="eager")
    network(IMAGES)
    wanted = extract(network, IMAGES, layers="head")
    found = extract(network, IMAGES, layers=["layers.0.0", "head"])
    torch.testing.assert_close(found["head"], wanted["head"])
    assert list(found) == ["layers.0.0", "head"]


def test_buffers_written_in_eval_mode_come_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("seen", None)
            self.register_buffer("replaced", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.replaced = self.replaced + 1
            return self.linear(x)

    model = Counting()
    before = dict(model.named_buffers())
    extract(model, torch.randn(3, 2), layers="linear")
    assert all(model.get_buffer(name) is buffer and not bool(buffer) for name, buffer in before.items())


def test_autocast_goes_on_with_its_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = extract(model, torch.randn(4, 3), layers="0")["0"]
        loss = model(torch.randn(4, 3)).sum()
    loss.backward()
    assert found.dtype == torch.float32
    assert model[0].weight.grad is not None


def state_of(model: nn.Module) -> tuple[Any, ...]:
    return (
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_and_the_generators_are_left_as_they_were(network: Network, breaks: bool) -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            if breaks and index == 7:
                raise RuntimeError("spoilt sample")
            return super().__getitem__(index)

    before = state_of(network)
    loader = DataLoader(Noisy(IMAGES), batch_size=3)
    if breaks:
        with pytest.raises(RuntimeError, match="spoilt"):
            extract(network, loader, layers="head")
    else:
        extract(network, loader, layers="head")
    torch.testing.assert_close(state_of(network), before, rtol=0, atol=0)


def test_hooks_are_removed_when_the_forward_pass_breaks() -> None:
    def spoil(x: Tensor) -> Tensor:
        raise RuntimeError("broken layer")

    model = Odd(spoil).train()
    with pytest.raises(RuntimeError, match="broken layer"):
        extract(model, torch.randn(3, 2), layers=["inner", "outer"])
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_eval_mode_is_used(network: Network) -> None:
    once, twice = (extract(network, IMAGES, layers="head")["head"] for _ in range(2))
    torch.testing.assert_close(once, twice, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer.0", r"got 'layer.0'; did you mean 'layers.0'"),
        ("nothing*here", "the model has 'layers', 'layers.0'"),
        ([], "at least one layer, got none"),
        ("layers", r"'layers', which was not; for a container take its parts, 'layers.\*'"),
        ("unused", "got 'unused', which was not"),
    ],
)
def test_layers_that_cannot_be_had(network: Network, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(network, IMAGES, layers=layers)


def test_a_layer_that_is_called_twice_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x))

    with pytest.raises(ValueError, match="'act', which was called 2 times"):
        extract(Shared(), torch.randn(3, 2), layers="act")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x / 0, r"output of layer 'outer' must be finite, got (inf|-inf|nan) in row 0"),
        (lambda x: x.mT, r"'outer' must have one row per sample, \[3, ...\], got \[2, 3\]"),
        (lambda x: "text", "'outer' must be a tensor or hold one, got str"),
        (lambda x: x.sum(), r"\[3, ...\], got \[\]"),
    ],
)
def test_outputs_that_are_no_representation(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(Odd(change), torch.randn(3, 2), layers="outer")


def test_bad_data_and_models(network: Network) -> None:
    images = TensorDataset(IMAGES)
    drawn = WeightedRandomSampler(torch.ones(10), 10)
    for loader in (
        DataLoader(images, shuffle=True),
        DataLoader(images, sampler=drawn),
        DataLoader(images, batch_sampler=BatchSampler(drawn, 3, drop_last=False)),
    ):
        with pytest.raises(ValueError, match=r"a fixed order.*RandomSampler; pass shuffle=False"):
            extract(network, loader, layers="head")
    for rows, got in [(["a", "b"], "str"), ([{"text": "a"}], "dict")]:
        with pytest.raises(TypeError, match=got):
            extract(network, DataLoader(rows), layers="head")  # type: ignore[arg-type, var-annotated]
    with pytest.raises(ValueError, match="at least one sample"):
        extract(network, IMAGES[:0], layers="head")
    with pytest.raises(TypeError, match=r"data must be a tensor.*got str"):
        extract(network, "images", layers="head")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        extract(3, IMAGES, layers="head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pooling must be one of"):
        extract(network, IMAGES, layers="head", pooling="max")  # type: ignore[arg-type]
    for device in ("xpu:9", "gpu"):
        with pytest.raises(ValueError, match=f"device must be one of this machine, got '{device}'"):
            extract(network, IMAGES, layers="head", device=device)


def test_runs_on_the_device_asked_for_and_comes_back(network: Network, device: torch.device) -> None:
    wanted = extract(network, IMAGES, layers="head")["head"]
    found = extract(network, IMAGES, layers="head", device=device)["head"]
    assert found.device.type == device.type
    assert next(network.parameters()).device.type == "cpu"
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)
