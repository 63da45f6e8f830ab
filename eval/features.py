"""Frozen features of images in shards."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mpp.data.augment import AugmentConfig
from mpp.data.read import read_shards
from mpp.hardware import device_of, multiplies_bfloat16
from mpp.models.vit import ViT

BATCH = 256  # images


@torch.no_grad()
def extract(encoder: ViT, shards: Path, split: str) -> tuple[Tensor, Tensor | None]:
    """The average patch token after each block, float32 (n, depth, d), and the labels (n,) if there are any.

    Images are seen once each, centred, in the shards' order; damaged ones are left out, with a warning.
    """
    device = device_of("auto")
    encoder = encoder.to(device).eval()
    batches = read_shards(shards, BATCH, split=split, image=encoder.config.image, train=False, augment=AugmentConfig())
    features, labels = [], []
    low = torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))
    for batch in tqdm(batches.iterate(), f"features of {split}", len(batches), unit="batch"):
        with low:
            tokens = encoder.embed(batch.images.to(device))
            outputs = encoder.encode(tokens, layers=range(encoder.config.depth))
        pooled = [encoder.patches(output).float().mean(1) for output in outputs]
        features.append(torch.stack(pooled, dim=1).cpu())
        labels.append(batch.labels)
    return torch.cat(features), None if labels[0] is None else torch.cat(labels)
