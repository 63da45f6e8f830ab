"""One step of masked autoencoding, ours against lightly's and transformers', the same sizes for all.

    python -m benchmarks.mae [--sizes tiny32 vit_s] [--rounds 5] [--threads 2] [--compiled]

Forward, backward and AdamW on one batch in memory, 75 % of the patches dropped, a class token, MAE's loss on normalised
pixels. The peers' images are float32 made beforehand, ours are uint8 as always. `pip install -e ".[bench]"`.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Bar, Contender, Timing
from benchmarks.step import LEARNING_RATE, STEPS, WARM_UP, Size, images_of, our_step, settle, timed

if TYPE_CHECKING:
    from torch import Tensor, nn

OURS, OURS_COMPILED = "mpp, default settings", "mpp, compiled"
LIGHTLY, TRANSFORMERS = "lightly MAE, bf16 autocast", "transformers ViTMAE, bf16 autocast"
LIGHTLY_BEST, TRANSFORMERS_BEST = "lightly MAE at its best", "transformers ViTMAE at its best"
SHARE = 0.75
EPS = 1e-6  # of a patch's variance (MAE, models_mae.py)
BARS = {LIGHTLY: Bar(1.8), TRANSFORMERS: Bar(2.0)}  # asked of tiny32


@dataclass(frozen=True)
class Decoder:
    width: int
    depth: int
    heads: int


SIZES = {
    "tiny32": (Size(32, 4, 192, 12, 3, 128), Decoder(128, 4, 4)),
    "vit_s": (Size(224, 16, 384, 12, 6, 8), Decoder(512, 8, 16)),
}


def prepare_ours(size: Size, decoder: Decoder, threads: int, compiled: bool | None = None) -> Callable[[], Timing]:
    from mpp.models.decoder_config import DecoderConfig
    from mpp.models.vit import ViT
    from mpp.models.vit_config import ViTConfig
    from mpp.objectives.mae import MAE
    from mpp.objectives.mae_config import MAEConfig

    settle(threads)
    shape: dict[str, Any] = size.shape() | {"image": (size.image, size.image), "positions": "sincos2d_mae"}
    objective = MAE(ViT(ViTConfig(**shape)), MAEConfig(share=SHARE, decoder=DecoderConfig(**asdict(decoder))))
    return our_step(objective, size, "cpu", compiled=compiled)


def lightly_mae(size: Size, decoder: Decoder) -> "nn.Module":
    """lightly's parts as its example (examples/pytorch/mae.py) puts them together, with normalised pixels."""
    import torch
    import torch.nn.functional as F
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    class MAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = VisionTransformer(
                size.image, size.patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads, num_classes=0
            )
            self.backbone = MaskedVisionTransformerTIMM(vit)
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                patch_size=size.patch,
                embed_dim=size.width,
                decoder_embed_dim=decoder.width,
                decoder_depth=decoder.depth,
                decoder_num_heads=decoder.heads,
            )

        def forward(self, images: "Tensor") -> "Tensor":
            length = self.backbone.sequence_length
            kept, hidden = utils.random_token_mask((len(images), length), mask_ratio=SHARE, device=images.device)
            seen = self.decoder.embed(self.backbone.encode(images, idx_keep=kept))
            tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
            tokens = utils.set_at_index(tokens, kept, seen.type_as(tokens))
            predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
            truth = utils.get_at_index(utils.patchify(images, size.patch), hidden - 1)
            variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
            return F.mse_loss(predicted, (truth - mean) / (variance + EPS).sqrt())

    return MAE()


def transformers_mae(size: Size, decoder: Decoder, attention: str) -> "nn.Module":
    from torch import nn
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=size.image,
        patch_size=size.patch,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.heads,
        decoder_intermediate_size=4 * decoder.width,
        mask_ratio=SHARE,
        norm_pix_loss=True,
        attn_implementation=attention,
    )

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ViTMAEForPreTraining(config)

        def forward(self, images: "Tensor") -> "Tensor":
            loss: Tensor = self.model(images).loss
            return loss

    return Loss()


def prepare_peer(size: Size, decoder: Decoder, threads: int, *, name: str) -> Callable[[], Timing]:
    """A peer's step as its users write it; at its best with attention by plain products, which are faster in bf16."""
    import timm
    import torch

    settle(threads)
    best = name in (LIGHTLY_BEST, TRANSFORMERS_BEST)
    if name in (LIGHTLY, LIGHTLY_BEST):
        timm.layers.set_fused_attn(not best)
        model = lightly_mae(size, decoder)
    else:
        model = transformers_mae(size, decoder, "eager" if best else "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=best)
    images = images_of(size, "cpu").float() / 127.5 - 1

    def step() -> "Tensor":
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return lambda: timed(step, size.batch, "cpu")


def contenders(size: Size, decoder: Decoder, threads: int, compiled: bool) -> list[Contender]:
    shared: dict[str, Any] = {"size": size, "decoder": decoder, "threads": threads}
    ours = [Contender(OURS, prepare_ours, shared)]
    ours += [Contender(OURS_COMPILED, prepare_ours, {**shared, "compiled": True})] if compiled else []
    peers = (LIGHTLY, LIGHTLY_BEST, TRANSFORMERS, TRANSFORMERS_BEST)
    return [*ours, *(Contender(name, prepare_peer, {**shared, "name": name}) for name in peers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also ours with train.compile")
    options = parser.parse_args()
    tables = {}
    for name in options.sizes:
        size, decoder = SIZES[name]
        timings = harness.interleave(contenders(size, decoder, options.threads, options.compiled), options.rounds)
        bars = BARS if name == "tiny32" else {}
        ratios = [harness.speed(timings, OURS, peer, bars.get(peer)) for peer in timings if peer != OURS]
        harness.table(f"{name} {size} {decoder}", timings, ratios)
        settings = asdict(size) | {"decoder": asdict(decoder), "steps": STEPS, "warm_up": WARM_UP}
        tables[name] = harness.summary(settings, timings, ratios)
    harness.write("mae-cpu", options.threads, "cpu", tables)


if __name__ == "__main__":
    main()
