import math

import pytest
import torch
from conftest import shaken, tiny_config
from learning import idle, trained
from torch import Tensor

import mpp
from mpp import targets
from mpp.batch import Batch
from mpp.execution import drawing
from mpp.models.cnn import ResNet
from mpp.models.patch_head_config import PatchHeadConfig
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.autoregressive import Autoregressive
from mpp.objectives.autoregressive_config import AutoregressiveConfig

N = 24  # patches of tiny_config: 4 x 6 of 8 pixels
PIXELS = 8 * 8 * 3
TARGETS = ["mean_colour", "colour_grid", "pixels", "normalised_pixels"]
DEEP = PatchHeadConfig(depth=2, width=48)


def build(encoder: ViT | None = None, **config) -> Autoregressive:
    encoder = encoder or ViT(tiny_config(positions="learned", pool="avg", mean=(0.4, 0.5, 0.6), std=(0.3,)))
    return shaken(Autoregressive(encoder, AutoregressiveConfig(**config)))


# Against a slow loop


def outputs_one_by_one(objective: Autoregressive, image: Tensor, prefix: int) -> list[Tensor]:
    """What is said of each patch behind the prefix, of patch 1 on at least, by those before it: no others are shown."""
    encoder, said = objective.encoder, []
    tokens = encoder.embed(image.unsqueeze(0))
    for k in range(max(1, prefix), N):
        seen = torch.arange(k).unsqueeze(0)
        if k == prefix:  # they see each other: the encoder as it is used afterwards
            alone = encoder.patches(encoder.encode(tokens, seen))
        else:
            alone = encoder.patches(slow_causal(encoder, tokens[:, :k], prefix))
        said.append(objective.head(alone)[0, -1])
    return said


def slow_causal(encoder: ViT, tokens: Tensor, prefix: int) -> Tensor:
    """The encoder's outputs at patches that are there, block by block, one query at a time over what it may see."""
    n, count = tokens.shape[1], encoder.prefix
    stream = tokens + encoder.positions.patches(encoder.own_grid)[:n]
    if encoder.class_token is not None:
        stream = torch.cat([(encoder.class_token + encoder.positions.class_token()).view(1, 1, -1), stream], dim=1)
    for block in encoder.blocks:
        normed, mixer = block.norm1(stream), block.mixer
        q, k, v = (part.unflatten(-1, (mixer.heads, -1)) for part in mixer.qkv(normed)[0].chunk(3, dim=-1))
        rows = []
        for query in range(count + n):
            keys = [key for key in range(count + n) if key <= query or key < count + prefix]
            scores = torch.einsum("hd,khd->hk", q[query], k[keys]) / math.sqrt(q.shape[-1])
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[keys]).flatten())
        stream = stream + mixer.project(torch.stack(rows).unsqueeze(0))
        stream = stream + block.mlp(block.norm2(stream))
    return encoder.norm(stream)


def truth_of(objective: Autoregressive, image: Tensor, k: int) -> Tensor:
    """What is true of patch k: its pixels as the encoder sees them, or the class of its mean colour or of its cells."""
    row, column = divmod(k, 6)
    pixels = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]  # (3, 8, 8)
    if objective.config.target in ("mean_colour", "colour_grid"):
        side = 8 if objective.config.target == "mean_colour" else 2
        classes = []
        for y in range(0, 8, side):
            for x in range(0, 8, side):
                red, green, blue = (int(pixels[c, y : y + side, x : x + side].float().mean() // 32) for c in range(3))
                classes.append(64 * red + 8 * green + blue)
        return torch.tensor(classes)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).double(), 0.3
    found = ((pixels.double().permute(1, 2, 0) / 255 - mean) / std).flatten()
    if objective.config.target == "normalised_pixels":
        found = (found - found.mean()) / (found.var(unbiased=True) + 1e-6).sqrt()
    return found


def error_of(said: Tensor, truth: Tensor) -> Tensor:
    if truth.is_floating_point():
        return (said - truth).square().mean()
    logits = said.view(len(truth), 512)
    return torch.stack([logits[cell].logsumexp(0) - logits[cell, truth[cell]] for cell in range(len(truth))]).mean()


@pytest.mark.parametrize("head", [PatchHeadConfig(), DEEP], ids=["linear", "deep"])
@pytest.mark.parametrize("prefix", ["none", "random"])
@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_the_loss_is_that_of_a_loop_that_shows_the_patches_before_alone(target, prefix, head):
    class_token = target == "pixels"  # its place is in front of the prefix
    config = tiny_config(positions="learned", pool="avg", class_token=class_token, mean=(0.4, 0.5, 0.6), std=(0.3,))
    encoder = ViT(config)
    objective = build(encoder, target=target, prefix=prefix, head=head).double()
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    lengths = torch.tensor([1, 9, N - 1])
    loss, _ = objective.compute(images, None if prefix == "none" else lengths)
    total = 0.0
    for image, length in zip(images, [0, 0, 0] if prefix == "none" else lengths.tolist(), strict=True):
        said = outputs_one_by_one(objective, image, length)
        first = max(1, length)
        total += sum(error_of(one, truth_of(objective, image, first + i)) for i, one in enumerate(said))
    expected = total / (3 * (N - 1) if prefix == "none" else 3 * N / 2)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_lengths_of_prefixes_are_uniform_from_one_to_all_but_one_and_each_images_own():
    drawn = build(prefix="random").draw(20_000, torch.device("cpu"))
    often = torch.bincount(drawn, minlength=N + 1) / len(drawn)
    assert (drawn.min().item(), drawn.max().item()) == (1, N - 1)
    assert often[1:N].tolist() == pytest.approx([1 / (N - 1)] * (N - 1), abs=4.5 * math.sqrt(1 / (N - 1) / 20_000))
    assert build(prefix="none").draw(5, torch.device("cpu")) is None


def test_predictions_weigh_alike_and_one_on_the_average_over_all_lengths():
    objective = build(prefix="random")
    weights = objective.counted(torch.arange(1, N))  # each length once
    assert weights.sum().item() == pytest.approx(1)
    for length, row in zip(range(1, N), weights, strict=True):
        assert row.tolist() == pytest.approx([0.0] * (length - 1) + [2 / N / (N - 1)] * (N - length))


def test_parts_of_a_batch_give_the_loss_of_the_whole():
    objective = build(target="normalised_pixels", prefix="random")
    batch = Batch(torch.randint(0, 256, (6, 3, 32, 48), dtype=torch.uint8))
    with drawing(3, 5, batch):
        whole, _ = objective(batch)
    parts = []
    for number, part in enumerate(batch.split(2)):
        with drawing(3, 5, part, number):
            parts.append(objective(part)[0])
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


# What can't be known


@pytest.mark.parametrize("prefix", ["none", "random"])
@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "relative", "class_token": True},
        {"positions": "rope", "registers": 2},
        {"mixer": ("attention", "identity")},
    ],
)
def test_no_prediction_feels_its_own_patch_or_one_behind_it(changes, prefix):
    encoder = ViT(tiny_config(**{"pool": "avg", **changes}))
    objective = build(encoder, target="pixels", prefix=prefix, head=DEEP)
    length = None if prefix == "none" else torch.tensor([7])
    for k in (7, 8, 15, N - 1):  # behind the prefix, if there is one
        images = torch.randn(1, 3, 32, 48, requires_grad=True)
        objective.predict(images, length)[0, k - 1].square().sum().backward()
        felt = targets.patch_pixels(images.grad, 8).abs().sum((0, 2)) > 0  # (n,)
        assert felt.tolist() == [patch < k for patch in range(N)]


@pytest.mark.parametrize("stem", ["overlap", "conv", "hybrid"])
def test_stems_that_show_a_token_the_next_patch_are_refused(stem):
    changes = {"stages": (1,), "stem_width": 32} if stem == "hybrid" else {}
    message = f"^objective.name autoregressive predicts each .* can't do: model.stem {stem} shows a token the pixels of"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Autoregressive(ViT(tiny_config(stem=stem, **changes)))


@pytest.mark.parametrize("mixer", ["mlp", "pool", "conv"])
def test_mixers_that_show_a_patch_the_next_one_are_refused(mixer):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=f"can't do: model.mixer {mixer} shows a patch what is beh"),
    ):
        Autoregressive(ViT(tiny_config(mixer=("attention", mixer))))


# Figures and pictures


def test_figures_are_of_predicted_patches_alone_beside_the_patch_before_and_the_commonest():
    objective = build(prefix="random")
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    images[:2] = images[:2, :, :1, :1]  # of one colour, which its copy tells
    lengths = torch.tensor([3, 20, 12])
    _, metrics = objective.compute(images, lengths)
    predicted = objective.predict(images, lengths).argmax(-1)
    classes = torch.tensor([[truth_of(objective, image, k).item() for k in range(N)] for image in images])
    pairs = [(b, k) for b in range(3) for k in range(lengths[b], N)]
    right = sum(predicted[b, k - 1].item() == classes[b, k].item() for b, k in pairs)
    copied = sum(classes[b, k - 1].item() == classes[b, k].item() for b, k in pairs)
    counts = torch.bincount(torch.tensor([classes[b, k] for b, k in pairs]))
    assert metrics["accuracy"].item() == pytest.approx(right / len(pairs))
    assert metrics["nearest"].item() == pytest.approx(copied / len(pairs))
    assert metrics["commonest"].item() == pytest.approx(counts.max().item() / len(pairs))
    assert metrics.keys() == objective.config.metrics.keys()
    assert objective.config.metrics["nearest"].title == "Guess without learning: the patch before"


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_decibels_are_of_predicted_patches_alone(target):
    objective = build(target=target, prefix="random")
    images, lengths = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8), torch.tensor([3, 20])
    _, metrics = objective.compute(images, lengths)
    predicted = objective.predict(images, lengths)
    errors, flat = [], []
    mean = torch.tensor([0.4, 0.5, 0.6])
    patches = (targets.patch_pixels(images, 8).unflatten(-1, (-1, 3)) / 255 - mean).flatten(2) / 0.3
    for b in range(2):
        for k in range(lengths[b], N):
            truth = patches[b, k]
            spread = (truth.var(unbiased=True) + 1e-6).sqrt()
            said = predicted[b, k - 1]
            said = said * spread + truth.mean() if target == "normalised_pixels" else said
            errors.append((0.3 * (said - truth)).square().mean())
            flat.append((0.3 * (truth.mean() - truth)).square().mean())
    assert metrics["psnr"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert metrics["flat"].item() == pytest.approx(torch.stack(flat).mean().item(), rel=1e-4)
    assert metrics.keys() == objective.config.metrics.keys()


@pytest.mark.parametrize("prefix", ["none", "random"])
@pytest.mark.parametrize("target", TARGETS)
def test_pictures_show_what_is_predicted_of_each_patch_and_the_first_one_as_it_is(target, prefix):
    objective = build(target=target, prefix=prefix)
    batch = Batch(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8))
    shown = objective.pictures(batch)
    lengths = None if prefix == "none" else torch.ones(2, dtype=torch.int64)
    assert list(shown) == list(objective.config.pictures)
    whole = targets.patch_pixels(batch.images, 8)
    assert torch.equal(shown["input"], batch.images)
    said = objective.target.painted(
        objective.predict(batch.images, lengths), objective.target.truth(batch.images)[:, 1:]
    )
    for name, expected in {"predicted": said, "truth": objective.target.shown(batch.images)[:, 1:]}.items():
        assert torch.equal(targets.patch_pixels(shown[name], 8), torch.cat([whole[:, :1], expected], dim=1))
    assert ("mean and contrast" in objective.config.pictures["predicted"]) == (target == "normalised_pixels")


# Learning


@pytest.mark.parametrize(
    ("pool", "prefix"),
    [
        *((pool, "random") for pool in ("cls", "avg", "avg_norm", "cls_avg", "map")),
        *((pool, "none") for pool in ("avg", "avg_norm", "map")),
    ],
)
def test_it_learns_with_any_pool_and_nothing_but_the_pool_is_idle(pool, prefix, batch):
    head = DEEP if prefix == "random" else PatchHeadConfig()
    objective = Autoregressive(ViT(tiny_config(pool=pool)), AutoregressiveConfig(prefix=prefix, head=head))
    batch.images[:] = batch.images[:, :, :1, :1]  # each image of one colour, which every patch tells
    lengths = None if prefix == "none" else torch.tensor([1, 5, 12, 20])
    losses = trained(objective, lambda: objective.compute(batch.images, lengths))
    first = math.log(512) * (1 if prefix == "none" else (23 + 19 + 12 + 4) / 48)
    assert losses[0] == pytest.approx(first), "the first guess is uniform"
    assert losses[-1] < 0.5 * losses[0]
    of_pool = ("encoder.pooling.", *["encoder.norm."] * (pool == "avg_norm"))
    assert [name for name in idle(objective) if not name.startswith(of_pool)] == []


def test_bfloat16_gives_nearly_the_same_loss_in_float32(batch):
    objective = build(target="normalised_pixels", prefix="random", head=DEEP)
    lengths = torch.tensor([1, 5, 12, 20])
    exact, _ = objective.compute(batch.images, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = objective.compute(batch.images, lengths)
    assert loss.dtype == metrics["psnr"].dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_aims_head_is_blocks_of_mlps_with_positions_before_and_no_bias_where_the_encoder_has_none():
    encoder = ViT(tiny_config(bias=False, qkv_bias=False, pool="avg"))
    head = Autoregressive(encoder, AutoregressiveConfig(target="pixels", head=DEEP)).head
    sizes = {name: tuple(part.shape) for name, part in head.named_parameters() if "norm" not in name}
    blocks = {
        f"mlps.{i}.{name}": shape
        for i in range(2)
        for name, shape in {"expand.weight": (192, 48), "contract.weight": (48, 192)}.items()
    }
    assert sizes == {"widen.weight": (48, 64), "last.weight": (PIXELS, 48)} | blocks
    same = torch.randn(1, 1, 64).expand(1, 4, 64)  # that of no patch
    said = shaken(head)(same)
    assert not torch.allclose(said[:, 0], said[:, 1]), "it knows their places"
    moved = head(torch.cat([same[:, :3], torch.randn(1, 1, 64)], dim=1))
    assert torch.equal(moved[:, :3], said[:, :3]), "nothing passes among patches"


# What does not go together


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchHeadConfig(depth=-1), "objective.head.depth must be 0 to 1000, got -1"),
        (lambda: PatchHeadConfig(depth=1, width=0), "objective.head.width must be 1 to 250000, got 0"),
        (
            lambda: PatchHeadConfig(width=64),
            "objective.head.width is that of its blocks, and there are none; give objec",
        ),
        (lambda: AutoregressiveConfig(bits=9), "objective.bits must be 1 to"),
        (lambda: AutoregressiveConfig(grid=0), "objective.grid must be at least 1, got 0"),
        (lambda: build(target="colour_grid", grid=3), r"objective.grid \(3\) must divide model.patch \(8\)"),
        (
            lambda: build(ViT(tiny_config(pool="cls"))),
            "objective.prefix none shows a class token no patch, and model.pool",
        ),
        (
            lambda: build(ViT(tiny_config(pool="cls_avg"))),
            "objective.prefix none shows a class token no patch, and model.pool cls_avg",
        ),
        (lambda: build(ViT(tiny_config(image=(8, 8), pool="avg"))), "needs at least 2 patches, got an image"),
        (lambda: build(ViT(tiny_config(channels=4, pool="avg"))), r"objective.target mean_colour needs .*got 4"),
        (
            lambda: build(ViT(tiny_config(width=66, heads=1, positions="none", pool="avg")), head=DEEP),
            "objective.head.depth needs a model.width that 4 divides, got 66",
        ),
        (
            lambda: Autoregressive(ResNet(ResNetConfig(image=(32, 32), depth=18, width=4, stem="small"))),
            r"objective.name autoregressive needs an encoder of patches \(model.name vit\), got resnet",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(make, message):
    with torch.device("meta"), pytest.raises(ValueError, match=f"^{message}|^objective.name autoregressive {message}"):
        make()


def test_the_public_names_are_these():
    assert (mpp.Autoregressive, mpp.AutoregressiveConfig) == (Autoregressive, AutoregressiveConfig)
    assert mpp.OBJECTIVES["autoregressive"].config is AutoregressiveConfig
