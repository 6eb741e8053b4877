"""The Stable Diffusion 1.x/2.x family: pixels to latents, words to states, the model's prediction.

Works for every pipeline stored in StableDiffusionPipeline's layout, with AutoencoderKL or AutoencoderTiny.
"""

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffadapt.models.text_conditioned import IDS, MASK, TextConditionedBase

# Values for options that were not given. What was tuned on the embedded base never reaches another base.
DEFAULTS = {
    "emoji": {
        "targets": "attention+conv",
        "train_batch_size": 8,
        "max_train_steps": 300,
        "lr_scheduler": "cosine",
        "preferred_precision": "bf16",
        "center_crop": True,
        "num_validation_images": 16,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "sample_batch_size": 20,
        "extractor": "embedded:clip",
    },
    "sd": {
        "targets": "attention",
        "train_batch_size": 4,
        "max_train_steps": 500,
        "lr_scheduler": "constant",
        "preferred_precision": "no",
        "center_crop": False,
        "num_validation_images": 4,
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "sample_batch_size": 4,
        "extractor": None,
    },
}
# Ranks and learning rates that were tried on a base; other methods bring their own.
TUNED = {
    "emoji": {
        "lora": {"rank": 8, "learning_rate": 5e-4},
        "flora": {"rank": 14, "learning_rate": 5e-4},
    },
    "sd": {},
}


class StableDiffusion(TextConditionedBase):
    """A loaded base of this family."""

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        return [self.pipe.tokenizer]

    def text_states(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, length, width): the text encoder's last, normalised states."""
        encoder = self.pipe.text_encoder
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens[MASK].to(encoder.device) if masked else None
        return {"encoder_hidden_states": encoder(tokens[IDS].to(encoder.device), attention_mask=mask)[0]}

    def ask(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: dict[str, Tensor]) -> Tensor:
        dtype = denoiser.dtype
        told = {name: value.to(dtype) for name, value in told.items()}
        return denoiser(noisy.to(dtype), timesteps, return_dict=False, **told)[0]
