"""Pre-training of the small ViTs of the image tasks, by backprop."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm

PRETRAINING = {
    "digits": {"epochs": 50, "batch_size": 64, "learning_rate": 2e-3},
    "fashion_mnist": {"epochs": 6, "batch_size": 128, "learning_rate": 2e-3},
}


def pretrain(
    config: Mapping[str, int],
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> transformers.PreTrainedModel:
    """Train a ViT on images (N, 1, H, W) float32 to tell their labels (N,) int64 and by how many
    quarters they turned.
    """
    # The turns keep features alive that a few old classes alone would let go.
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn from the global generator
        torch.default_generator.manual_seed(0)
        vit = transformers.ViTConfig(num_labels=4 * (int(labels.max()) + 1), **config)
        model = transformers.ViTForImageClassification(vit).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05, fused=True)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, epochs=epochs, steps_per_epoch=steps
    )
    for _ in tqdm(range(epochs), desc="Pre-training a small ViT, once"):
        for rows in torch.randperm(len(images), generator=generator)[: steps * batch_size].split(
            batch_size
        ):
            quarters = torch.randint(4, (batch_size,), generator=generator)
            turned = _jitter(images[rows], quarters, generator)
            model(pixel_values=turned, labels=4 * labels[rows] + quarters).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def _jitter(
    images: torch.Tensor, quarters: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Turn images (n, C, H, W) float32 by quarters (n,) and up to 0.1 rad, shift by up to 5 %,
    stretch by up to 10 %.
    """
    turn, shift, stretch = 0.1 * torch.empty(3, len(images), 2).uniform_(-1, 1, generator=generator)
    angle = turn[:, 0] + quarters * (torch.pi / 2)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    maps = torch.cat([rotation * (1 + stretch)[:, None], shift[..., None]], 2)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    # it pads with 0, and the background is -1
    return F.grid_sample(images + 1, grid, align_corners=False) - 1
