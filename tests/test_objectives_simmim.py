from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from conftest import shaken, tiny_config
from learning import check_bfloat16, check_compiled, idle, trained
from torch import Tensor

from mpp import targets
from mpp.batch import Batch
from mpp.models.cnn import ResNet
from mpp.models.layers import take
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.simmim import SimMIM
from mpp.objectives.simmim_config import SimMIMConfig

CPU = torch.device("cpu")


def build(encoder: ViT | None = None, **config) -> SimMIM:
    return shaken(SimMIM(encoder or ViT(tiny_config()), SimMIMConfig(**config)))


# Against SimMIM's head on a ViT, as transformers has it


def as_theirs(ours: SimMIM, value: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Values of our parameters, weights or gradients, under transformers' names."""

    def of(module: str, name: str) -> Iterator[tuple[str, Tensor]]:
        return ((f"{name}.{kind}", value[f"{module}.{kind}"]) for kind in ("weight", "bias"))

    stem, head = value["encoder.stem.project.weight"], value["head.weight"]
    yield "vit.embeddings.cls_token", value["encoder.class_token"][None, None]
    yield "vit.embeddings.mask_token", value["mask_token"][None, None]
    yield "vit.embeddings.position_embeddings", value["encoder.positions.table"][None]
    yield "vit.embeddings.patch_embeddings.projection.weight", stem.unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
    yield "vit.embeddings.patch_embeddings.projection.bias", value["encoder.stem.project.bias"]
    # Rows of the head are of a pixel's row, column, channel; PixelShuffle wants channel, row, column.
    yield "decoder.0.weight", head.unflatten(0, (8, 8, 3)).permute(2, 0, 1, 3).flatten(0, 2)[:, :, None, None]
    yield "decoder.0.bias", value["head.bias"].unflatten(0, (8, 8, 3)).permute(2, 0, 1).flatten()
    yield from of("encoder.norm", "vit.layernorm")
    for number in range(ours.encoder.config.depth):
        block, layer = f"encoder.blocks.{number}", f"vit.layers.{number}"
        for module, name in {
            "norm1": "layernorm_before", "norm2": "layernorm_after", "mixer.project": "attention.o_proj",
            "mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2",
        }.items():  # fmt: skip
            yield from of(f"{block}.{module}", f"{layer}.{name}")
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", value[f"{block}.mixer.qkv.{kind}"].chunk(3), strict=True):
                yield f"{layer}.attention.{letter}_proj.{kind}", part


@pytest.fixture(scope="module")
def official() -> SimpleNamespace:
    """Ours and theirs with the same weights and mask, and what theirs gives."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ours = build(ViT(tiny_config(image=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25)))).double()
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, encoder_stride=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.ViTForMaskedImageModeling(config).double()
    theirs.load_state_dict(dict(as_theirs(ours, {name: part.detach() for name, part in ours.named_parameters()})))
    images, hidden = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), ours.draw(3, CPU)
    mask = torch.zeros(3, 16, dtype=torch.bool).scatter(1, hidden, True)
    mean, std = (torch.tensor(part, dtype=torch.float64).view(3, 1, 1) for part in ([0.4, 0.5, 0.6], [0.3, 0.2, 0.25]))
    result = theirs(pixel_values=(images.double() / 255 - mean) / std, bool_masked_pos=mask)
    result.loss.backward()
    return SimpleNamespace(ours=ours, theirs=theirs, result=result, images=images, hidden=hidden)


def test_predictions_and_the_loss_are_the_official_ones(official):
    with torch.no_grad():
        predicted = official.ours.predict(official.images, official.hidden)
        loss, _ = official.ours.compute(official.images, official.hidden)
    theirs = take(targets.patch_pixels(official.result.reconstruction, 8), official.hidden)
    torch.testing.assert_close(predicted, theirs, rtol=1e-6, atol=1e-6)
    assert predicted.dtype == loss.dtype == torch.float64
    # Theirs is divided by the 3 * 12 * 64 hidden pixels and 1e-5 more. Our mean and std are float32 numbers.
    assert loss.item() == pytest.approx(official.result.loss.item() * (1 + 1e-5 / (3 * 12 * 64)), rel=1e-6)


def test_every_gradient_is_the_official_one(official):
    official.ours.zero_grad()
    official.ours.compute(official.images, official.hidden)[0].backward()
    gradients = {name: part.grad for name, part in official.ours.named_parameters()}
    theirs = {name: part.grad for name, part in official.theirs.named_parameters()}
    found = dict(as_theirs(official.ours, gradients))
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        scale = theirs[name.replace("k_proj.bias", "q_proj.bias")].abs().max()  # no softmax feels keys' biases
        assert scale > 0, name
        assert (gradient - theirs[name]).abs().max() < 1e-5 * scale, name


# The rest


@pytest.mark.parametrize("stem", ["linear", "overlap"])
@pytest.mark.parametrize("pool", ["cls", "avg", "avg_norm", "cls_avg", "map"])
def test_the_loss_is_the_mean_over_hidden_patches_alone_and_they_are_not_seen(pool, stem, batch):
    objective = build(ViT(tiny_config(pool=pool, stem=stem, positions="sincos2d", std=(0.25,))))
    hidden = objective.draw(4, CPU)
    assert hidden.shape == (4, 16), "0.6 of 6 units of 4 patches, rounded up"
    pixels = ((batch.images / 255 - 0.5) / 0.25).requires_grad_()
    predicted = objective.predict(pixels, hidden)
    truth = targets.patch_pixels(pixels.detach(), 8)
    errors = [
        (predicted[image, number] - truth[image, patch]).abs().mean()
        for image in range(4)
        for number, patch in enumerate(hidden[image].tolist())
    ]
    loss, metrics = objective.compute(batch.images, hidden)
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert metrics.keys() == objective.config.metrics.keys()
    predicted.square().sum().backward()
    felt = targets.patch_pixels(pixels.grad, 8).abs().sum(-1)
    kept = torch.ones(4, 24, dtype=torch.bool).scatter(1, hidden, False)
    assert felt[~kept].eq(0).all()
    assert felt[kept].gt(0).all()


@pytest.mark.parametrize("mask", ["random", "blocks", "units", "inverse_block"])
def test_it_learns_and_nothing_in_it_is_idle(mask, batch):
    objective = SimMIM(ViT(tiny_config(pool="avg", positions="sincos2d")), SimMIMConfig(mask=mask, share=0.5))
    batch.images[:] = batch.images[:, :, :1, :1]  # each image of one colour, which every patch tells
    losses = trained(objective, lambda: objective(batch))
    assert losses[-1] < 0.6 * losses[0]
    assert idle(objective) == []


def test_it_compiles_as_a_whole(batch):
    objective = build()
    hidden = objective.draw(4, CPU)
    check_compiled(objective.compute, batch.images, hidden)


def test_bfloat16_gives_nearly_the_same_loss_in_float32(batch):
    objective = build()
    hidden = objective.draw(4, CPU)
    check_bfloat16(objective.compute, batch.images, hidden)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_what_is_seen_and_predictions_in_hidden_patches(channels):
    objective = build(ViT(tiny_config(channels=channels)))
    with torch.no_grad():  # it says white, whatever it sees
        objective.head.weight.zero_()
        objective.head.bias.fill_(1)
    images = torch.randint(0, 255, (2, channels, 32, 48), dtype=torch.uint8)
    torch.manual_seed(3)
    shown = objective.pictures(Batch(images))
    torch.manual_seed(3)
    hidden = objective.draw(2, CPU)
    assert list(shown) == list(objective.config.pictures)
    parts = {name: targets.patch_pixels(picture, 8) for name, picture in shown.items()}
    truth = targets.patch_pixels(images, 8)
    assert torch.equal(parts["truth"], truth)
    kept = torch.ones(2, 24, dtype=torch.bool).scatter(1, hidden, False)
    for name in ("seen", "predicted"):
        assert parts[name].dtype == torch.uint8
        assert torch.equal(parts[name][kept], truth[kept])
    assert (parts["predicted"][~kept] == 255).all()
    assert len(parts["seen"][~kept].unique(dim=0)) == 1, "the same pattern in each"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": (24, 48)}, "objective.mask units, objective.share 0.6: units of 2 x 2 .* a grid of 3 x 6"),
        ({"image": (16, 16)}, "objective.mask units, objective.share 0.6: .* nothing visible of a grid of 2 x 2"),
    ],
)
def test_images_that_its_mask_does_not_fit_are_refused(changes, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        SimMIM(ViT(tiny_config(**changes)))


def test_encoders_without_patches_are_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"objective.name simmim needs an encoder of patches"):
        SimMIM(ResNet(ResNetConfig(depth=18)))
