"""Visual prompts: a trained border of pixels, or tokens beside the patches, of a frozen vision
model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, ObjectiveError
from ..objectives.base import ModelOutputs

KINDS = ("border", "tokens")


class VisualPrompt(nn.Module):
    """A frozen vision model with a trained prompt, which replaces the model: `clip.vision_model =
    VisualPrompt(clip.vision_model)`.

    A border is added to the outermost entries of `pixel_values`. Tokens are appended to the output
    of the module `embeddings`. Both are embeddings whose entries every row looks up, so the per-row
    rule for embeddings applies.

    Args:
        vision_model: any module that takes `pixel_values` (R, C, H, W), an image classifier too.
        kind: "border" or "tokens".
        size: width of the border in pixels, or number of tokens.

    Attributes:
        prompt: (1, pixels of the border) or (tokens, D), in its `weight`; a border starts at zero,
            tokens near it.

    Raises:
        ConfigurationError: an unknown kind, a border that leaves no image, or a model without
            suitable embeddings.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_flops import VisualPrompt
        >>> config = ViTConfig(image_size=8, patch_size=4, hidden_size=24, num_hidden_layers=1)
        >>> model = VisualPrompt(ViTForImageClassification(config), "border", size=2)
        >>> model(torch.rand(4, 3, 8, 8)).logits.shape
        torch.Size([4, 2])
        >>> model.prompt.weight.shape  # 3 colours of 64 pixels less the 16 inside
        torch.Size([1, 144])

    References:
        Bahng et al. (2022), Exploring Visual Prompts, arXiv 2203.17274; Jia et al. (2022), Visual
        Prompt Tuning, arXiv 2203.12119, section 3.2.
    """

    def __init__(self, vision_model: nn.Module, kind: str = "border", size: int = 4) -> None:
        super().__init__()
        if kind not in KINDS or size < 1:
            raise ConfigurationError(
                f"kind={kind!r} of size={size!r} is no visual prompt: use {KINDS} of 1 or more."
            )
        self.vision_model, self.kind, self.size = vision_model.requires_grad_(False), kind, size
        self.config: Any = getattr(vision_model, "config", None)
        config: Any = getattr(self.config, "vision_config", self.config)
        needed = "hidden_size" if kind == "tokens" else "image_size"
        if not hasattr(config, needed):
            raise ConfigurationError(
                f"{type(vision_model).__name__} has no config.{needed}, which kind={kind!r} needs."
            )
        if kind == "tokens":
            self.prompt = nn.Embedding(size, config.hidden_size)
            self._embeddings  # noqa: B018 - raises if it is missing
            nn.init.normal_(self.prompt.weight, std=0.02)
            return
        sides = config.image_size
        height, width = sides if isinstance(sides, (list, tuple)) else (sides, sides)
        if 2 * size >= min(height, width):
            raise ConfigurationError(
                f"A border of {size} pixels covers an image of {height} x {width}: use a smaller "
                "one."
            )
        frame = torch.ones(config.num_channels, height, width, dtype=torch.bool)
        frame[:, size:-size, size:-size] = False
        self.shape = frame.shape
        self.register_buffer("places", frame.flatten().nonzero().flatten(), persistent=False)
        self.prompt = nn.Embedding(1, int(frame.sum()))
        nn.init.zeros_(self.prompt.weight)

    @property
    def _embeddings(self) -> nn.Module:
        for name, module in self.vision_model.named_modules():
            if name.rpartition(".")[2] == "embeddings":
                return module
        raise ConfigurationError(
            f"{type(self.vision_model).__name__} has no module called embeddings to add tokens "
            "to: use kind='border'."
        )

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: object
    ) -> ModelOutputs:
        """Run the vision model on images (R, C, H, W) with the prompt."""
        kwargs = kwargs if labels is None else {**kwargs, "labels": labels}
        if self.kind == "border":
            return self.vision_model(pixel_values=self._framed(pixel_values), **kwargs)
        rows = torch.arange(self.size, device=pixel_values.device).expand(len(pixel_values), -1)
        tokens = self.prompt(rows)  # (R, size, D)
        handle = self._embeddings.register_forward_hook(
            lambda module, given, out: torch.cat([out, tokens.to(out)], 1)
        )
        try:
            return self.vision_model(pixel_values=pixel_values, **kwargs)
        finally:
            handle.remove()

    def _framed(self, pixel_values: Tensor) -> Tensor:
        """Add the border to images (R, C, H, W)."""
        if pixel_values.shape[1:] != self.shape:
            raise ObjectiveError(
                f"The border is for images of {tuple(self.shape)}, not "
                f"{tuple(pixel_values.shape[1:])}."
            )
        border = self.prompt(
            torch.zeros(len(pixel_values), dtype=torch.int64, device=pixel_values.device)
        )
        places = self.get_buffer("places").expand(len(pixel_values), -1)
        flat = pixel_values.flatten(1)
        return flat.scatter_add(1, places, border.to(flat)).view(pixel_values.shape)
