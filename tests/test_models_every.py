"""Every stem with every mixer, position and pool: those that are allowed run, the others are refused by name."""

from itertools import product

import pytest
import torch
from conftest import shaken

from mpp.batch import Batch
from mpp.models.mixers import MIXERS
from mpp.models.pools import POOLS
from mpp.models.positions import POSITIONS
from mpp.models.stems import STEMS
from mpp.models.trunk_config import ON_GRID
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.objectives.masked_patch import Draw, MaskedPatchPrediction

IN_ATTENTION = ("relative", "rope", "rope_capi")
OF_ENCODERS = [name for name in MIXERS if name != "cross"]  # which looks at an encoder's output
CHOICES = list(product(STEMS, [*OF_ENCODERS, "pool and attention"], POSITIONS, POOLS))


def config_of(stem: str, mixer: str, positions: str, pool: str, **changes) -> ViTConfig:
    mixed = ("pool", "attention") if mixer == "pool and attention" else (mixer,)
    shape = {"image": (16, 24), "patch": 8, "width": 32, "depth": len(mixed), "heads": 2, "stages": (1,)}
    choice = {"stem": stem, "mixer": mixed, "positions": positions, "pool": pool}
    return ViTConfig(**(shape | choice | changes))  # type: ignore[arg-type]


def refusal(mixer: str, positions: str, pool: str) -> str | None:
    """What must not be, by the names of those that don't go together."""
    if "attention" not in mixer and pool in ("cls", "cls_avg"):
        return f"model.pool {pool} needs attention in some block; mixer {mixer} passes it nothing"
    if "attention" not in mixer and positions in IN_ATTENTION:
        return f"model.positions {positions} work inside attention, and model.mixer is {mixer}"
    return None


ALLOWED = [choice for choice in CHOICES if refusal(*choice[1:]) is None]
BY_TABLE = [  # each value of each table once
    *((stem, "attention", "learned", "cls") for stem in STEMS),
    *(("linear", mixer, "learned", "avg") for mixer in OF_ENCODERS),
    *(("linear", "attention", positions, "cls") for positions in POSITIONS),
    *(("linear", "attention", "learned", pool) for pool in POOLS),
]

CLIPS = {"pre_norm": True, "stem_bias": False, "gelu": "quick"}
CHOSEN = [choice for choice in ALLOWED[::11] if choice not in BY_TABLE]


def test_most_choices_are_allowed():
    assert len(CHOICES) == 4 * 6 * 9 * 5
    assert len(ALLOWED) == 4 * (2 * 9 * 5 + 4 * 6 * 3)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if refusal(*choice[1:])], ids="-".join)
def test_what_does_not_go_together_is_refused_by_name(choice):
    with pytest.raises(ValueError, match=refusal(*choice[1:])):
        config_of(*choice)


@pytest.mark.parametrize("choice", ALLOWED, ids="-".join)
def test_every_choice_runs_whole_masked_and_with_dropped_patches(choice):
    encoder = shaken(ViT(config_of(*choice)))
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    vectors = encoder(images)
    assert vectors.shape == (2, 64 if choice[-1] == "cls_avg" else 32)
    vectors.square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, f"{name} has no part in the output"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} does not matter to the output"

    objective = shaken(MaskedPatchPrediction(encoder))
    loss, _ = objective(Batch(images))
    loss.backward()
    assert loss.isfinite()

    tokens, keep = encoder.embed(images), torch.tensor([[4, 1, 3], [0, 5, 2]])
    if needy := [name for name in encoder.config.mixer if name in ON_GRID]:
        for given in ((tokens, keep), (tokens[:, :3], None, keep)):
            with pytest.raises(ValueError, match=f"model.mixer {needy[0]} needs the whole grid"):
                encoder.encode(*given[:2], places=given[2] if len(given) > 2 else None)
        return
    kept = encoder.patches(encoder.encode(tokens, keep))
    assert kept.shape == (2, 3, 32)
    alone = encoder.encode(encoder.embed(images, keep), places=keep)  # of the kept patches alone from the start
    torch.testing.assert_close(encoder.patches(alone), kept, atol=1e-5, rtol=1e-5)
    # Dropping none, in another order, gives the same outputs in that order: each patch keeps its position.
    order = torch.tensor([[4, 1, 3, 0, 5, 2], [0, 5, 2, 1, 4, 3]])
    turned = encoder.patches(encoder.encode(tokens, order))
    expected = encoder.patches(encoder.encode(tokens)).gather(1, order.unsqueeze(2).expand(-1, -1, 32))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", [*OF_ENCODERS, "pool and attention"])
@pytest.mark.parametrize("stem", STEMS)
def test_masked_patches_pixels_reach_no_prediction(stem, mixer):
    objective = shaken(MaskedPatchPrediction(ViT(config_of(stem, mixer, "learned", "avg"))))
    pixels = torch.randn(1, 3, 16, 24, requires_grad=True)
    patches = torch.tensor([[1, 3]])
    draw = Draw(patches, torch.zeros(1, 2), (patches + 1) % 6)  # fate 0: both become [mask]
    objective.predict(pixels, draw).square().sum().backward()
    reached = pixels.grad.unflatten(2, (2, 8)).unflatten(4, (3, 8)).abs().sum((0, 1, 3, 5)).flatten()  # by patch
    assert reached[[1, 3]].tolist() == [0, 0]
    if mixer != "identity":
        assert reached.sum() > 0


@pytest.mark.parametrize("choice", ALLOWED[::7], ids="-".join)
def test_other_grids_are_taken_or_refused_by_name(choice):
    encoder = shaken(ViT(config_of(*choice)))
    images = torch.randint(0, 256, (2, 3, 32, 16), dtype=torch.uint8)
    if "mlp" in encoder.config.mixer:
        with pytest.raises(ValueError, match="model.mixer mlp has weights for a grid of 2x3 patches only"):
            encoder(images)
        return
    assert encoder(images).shape == (2, encoder.width)
    resized = encoder.resized(image=(32, 16))
    torch.testing.assert_close(resized(images), encoder(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("choice", BY_TABLE, ids="-".join)
def test_bfloat16_is_near_float32(choice):
    encoder = shaken(ViT(config_of(*choice, image=(32, 48)))).eval()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    exact = encoder(images)
    found = encoder.bfloat16()(images)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.08 * exact.abs().max()


@pytest.mark.parametrize("choice", [*BY_TABLE, *CHOSEN], ids="-".join)
def test_a_norm_before_the_blocks_and_a_stem_without_bias_go_with_each(choice):
    encoder = shaken(ViT(config_of(*choice, **CLIPS)))
    assert encoder.stem.project.bias is None
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    encoder(images).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), f"{name} does not matter to the output"
    loss, _ = MaskedPatchPrediction(encoder)(Batch(images))
    loss.backward()
    assert loss.isfinite()
    # It norms what goes into the blocks, tokens and positions: scaled by one factor they give the same.
    encoder.norm_pre.eps = 0.0
    tokens, before = encoder.embed(images), encoder.state_dict()
    scaled = {name: 3 * value for name, value in before.items() if name in ("class_token", "positions.table")}
    if encoder.config.positions == "learned":
        expected = encoder.encode(tokens)
        encoder.load_state_dict(before | scaled)
        torch.testing.assert_close(encoder.encode(3 * tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("choice", BY_TABLE, ids="-".join)
def test_compiled_it_computes_the_same(choice):
    encoder = shaken(ViT(config_of(*choice)))
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), encoder(images), atol=1e-5, rtol=1e-5)
    compiled(images).square().mean().backward()
