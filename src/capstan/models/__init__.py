"""A Hugging Face causal language model before its weights are read: layers, what each takes, which bytes."""

from capstan.models.attention_geometry import AttentionGeometry
from capstan.models.checkpoint_map import map_checkpoint
from capstan.models.layer_profile import Anatomy, LayerAnatomy
from capstan.models.meta_model import Skeleton, open_skeleton
from capstan.models.weight_manifest import Inventory, take_inventory

__all__ = [
    "Anatomy",
    "AttentionGeometry",
    "Inventory",
    "LayerAnatomy",
    "Skeleton",
    "map_checkpoint",
    "open_skeleton",
    "take_inventory",
]
