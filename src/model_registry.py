"""The model classes, by `model.name` of the config."""

from src.hf_causal_lm import ComposerHFCausalLM
from src.modern_gpt import ComposerModernGPT
from src.mosaic_gpt import ComposerMosaicGPT

COMPOSER_MODEL_REGISTRY = {'mosaic_gpt': ComposerMosaicGPT, 'modern_gpt': ComposerModernGPT,
                           'hf_causal_lm': ComposerHFCausalLM}
