"""CLIP variants: each module registers a build function beside its config class."""

from twotower.models import bert_resnet, openai_finetune, openai_pretrain
from twotower.models.dual_encoder import MODELS, DualEncoder, DualEncoderOutput, ModelBundle, Tower

__all__ = [
    "MODELS",
    "DualEncoder",
    "DualEncoderOutput",
    "ModelBundle",
    "Tower",
    "bert_resnet",
    "openai_finetune",
    "openai_pretrain",
]
