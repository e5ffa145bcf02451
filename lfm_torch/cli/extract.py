"""``lfm-torch extract``: the activations of one checkpoint's layers, in a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from lfm_torch import _checks, _files
from lfm_torch.cli.inputs import load_data, load_model
from lfm_torch.cli.options import OK, add_model, make_writable
from lfm_torch.representations.checkpoints import Checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``lfm-torch extract`` takes, beside the options of every command."""
    parser.add_argument("checkpoint", metavar="CKPT")
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors or .npz file")


def run(arguments: argparse.Namespace) -> int:
    """Extract, write, and return the exit status."""
    suffix = arguments.out.suffix
    if suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out must end on .safetensors or .npz, got {arguments.out.name!r}")
    checkpoints = Checkpoints(
        [arguments.checkpoint],
        load_model(arguments),
        load_data(arguments.data),
        layers=arguments.layers,
        pooling=arguments.pooling,
        batch_size=arguments.batch_size,
        device=arguments.device,
        unsafe_pickle=arguments.unsafe_pickle,
    )
    if len(checkpoints) != 1:
        raise ValueError(f"CKPT must be one checkpoint, got {len(checkpoints)} under {arguments.checkpoint!r}")
    make_writable(arguments.out.parent)
    found = {name: x.cpu() for name, x in next(iter(checkpoints.values())).items()}
    for name, x in found.items():
        _checks.check_finite(f"the output of layer {name!r}", x)
    _files.write_atomically(arguments.out, _serialized(found, suffix))
    shapes = {name: list(x.shape) for name, x in found.items()}
    if arguments.json:
        print(json.dumps({"layers": shapes, "written": str(arguments.out)}, indent=2))
    elif not arguments.quiet:
        for name, shape in shapes.items():
            print(f"{name}  {shape}")
        print(f"written: {arguments.out}")
    return OK


def _serialized(found: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        from safetensors.torch import save

        return save({name: x.contiguous() for name, x in found.items()})
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **{name: x.numpy() for name, x in found.items()})  # type: ignore[arg-type, unused-ignore]
    return buffer.getvalue()
