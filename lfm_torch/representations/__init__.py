"""From models and files to representations ``{layer: [n, d]}``: row i is what a layer answers to sample i of a probe.

Takes a model and inputs, checkpoints, saved activations or names of pretrained models; gives tensors, layer by layer,
and a digest of all that they depend on. It stands beside the graphs and knows none of the stages that follow.
"""

from lfm_torch.representations.arrays import load_array
from lfm_torch.representations.checkpoint_files import Checkpoint
from lfm_torch.representations.checkpoint_search import find_checkpoints
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.extraction import extract
from lfm_torch.representations.models import Models
from lfm_torch.representations.saved_activations import Activations
from lfm_torch.representations.sources import Given, Source
from lfm_torch.representations.state_dicts import load_weights

__all__ = [
    "Activations",
    "Checkpoint",
    "Checkpoints",
    "Given",
    "Models",
    "Source",
    "extract",
    "find_checkpoints",
    "load_array",
    "load_weights",
]
