"""Two models joined by a translator: the encoder of one, the head of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfm_torch.alignment.translator import Translator


class Stitched(nn.Module):
    """``head(translator(encoder(x)))``; the translator moves with the module and is not trained."""

    matrix: Tensor
    origin_x: Tensor
    origin_y: Tensor

    def __init__(self, encoder: nn.Module, head: nn.Module, translator: Translator) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.kind, self.n_pairs = translator.kind, translator.n_pairs
        for name in ("matrix", "origin_x", "origin_y"):
            self.register_buffer(name, getattr(translator, name).detach())

    @property
    def translator(self) -> Translator:
        """The translator, on the device of the module."""
        return Translator(self.matrix, self.origin_x, self.origin_y, self.kind, self.n_pairs)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Encode with one model, translate, go on with the other."""
        latent = self.encoder(*args, **kwargs)
        flat = latent.flatten(1)
        # what comes out is what goes on: the head of a half model has half weights
        translated = self.translator(flat).to(torch.promote_types(flat.dtype, self.matrix.dtype))
        same = translated.shape[-1] == flat.shape[-1]
        return self.head(translated.view_as(latent) if same else translated)


def stitch(encoder: nn.Module, head: nn.Module, translator: Translator) -> Stitched:
    """Join the encoder of one model to the head or decoder of another, without training.

    Outputs ``[b, ...]`` of the encoder are flattened for the translator, and given back their shape where the number of
    features is kept.

    Args:
        encoder: Module whose outputs lie in x's space.
        head: Module that takes representations in y's space.
        translator: From x's space to y's, see :func:`fit_translator`.

    Raises:
        TypeError: not modules, or not a Translator.
    """
    for name, module in (("encoder", encoder), ("head", head)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(translator, Translator):
        raise TypeError(f"translator must be a Translator, got {type(translator).__name__}")
    return Stitched(encoder, head, translator)
