"""A Hugging Face causal language model before its weights are read: layers, what each takes, which bytes."""

from capstan.models.attention_geometry import AttentionGeometry
from capstan.models.checkpoint_map import map_checkpoint
from capstan.models.layer_profile import LayerProfile, ModelProfile
from capstan.models.meta_model import MetaModel, open_meta_model
from capstan.models.saving import refuse_other_weights, save_stage
from capstan.models.stage import Stage, StageCut
from capstan.models.stages import cut_causal_lm, load_stage
from capstan.models.weight_manifest import WeightManifest, list_weights

__all__ = [
    "AttentionGeometry",
    "LayerProfile",
    "MetaModel",
    "ModelProfile",
    "Stage",
    "StageCut",
    "WeightManifest",
    "cut_causal_lm",
    "list_weights",
    "load_stage",
    "map_checkpoint",
    "open_meta_model",
    "refuse_other_weights",
    "save_stage",
]
