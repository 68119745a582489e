"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size and crop as conditioning.

Belongs here: what SDXL does otherwise than `stable_diffusion`. Does not belong here: training.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainers.backbones.conditioning import Conditioning
from trainers.backbones.stable_diffusion import StableDiffusionBackbone


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """The functions through which everything else uses the model; see `trainers.backbones`.

    The published autoencoder's float16 weights overflow: it runs in float32 here. Where others are to run the exported model
    in half precision, `backbones.vae` names the fp16-safe one, for caches, sampling and the export alike.
    """

    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    encoder_classes: ClassVar[dict[str, Any]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Return both encoders' hidden states before their last layers, side by side, and the second one's text embedding.

        The empty prompt is encoded like any other (it is what a dropped prompt becomes in training, as in Diffusion-DPO),
        though the sampling pipeline may stand for it with zeros (`force_zeros_for_empty_prompt`).
        """
        hidden = []
        with self._exact():
            for tokenizer, encoder in zip(self.tokenizers.values(), self.text_encoders.values(), strict=True):
                output = encoder(self._tokens(tokenizer, prompts), output_hidden_states=True)
                hidden.append(output.hidden_states[-2])
        return Conditioning(torch.cat(hidden, -1), output.text_embeds)

    @cached_property
    def _time_ids(self) -> torch.Tensor:
        """Original size, crop's corner, target size, [6]: the same for every picture, as Diffusion-DPO's SDXL run has it.

        So a picture is said to have had the training resolution and no crop, whatever it had.
        """
        size = self.config.resolution
        return torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32, device=self.device)

    def predict(
        self, unet: Any, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Return the model's prediction (epsilon or v), shaped as `noisy`, [N, C, H, W].

        Raises:
            ValueError: the conditioning has no pooled embedding.
        """
        if conditioning.pooled is None:
            raise ValueError("SDXL: the conditioning has no pooled embedding; encode the prompts with this backbone")
        added = {"text_embeds": conditioning.pooled, "time_ids": self._time_ids.expand(len(noisy), -1)}
        return unet(noisy, timesteps, encoder_hidden_states=conditioning.hidden, added_cond_kwargs=added).sample

    def _pipeline_options(self) -> dict[str, Any]:
        zeros = bool(self.checkpoint.index.get("force_zeros_for_empty_prompt", True))
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
