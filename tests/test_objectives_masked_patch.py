import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from mpp import targets
from mpp.batch import Batch
from mpp.models.layers import take
from mpp.models.vit import ViT
from mpp.objectives.masked_patch import KEPT, MASKED, REPLACED, Draw, MaskedPatchPrediction
from mpp.objectives.masked_patch_config import MaskedPatchConfig

TARGETS = ["mean_colour", "colour_grid", "pixels", "normalised_pixels"]


def build(encoder: ViT, **config) -> MaskedPatchPrediction:
    objective = MaskedPatchPrediction(encoder, MaskedPatchConfig(**config))
    torch.nn.init.normal_(objective.head.weight, std=0.1)  # zero at first, which would hide mistakes
    return objective


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d", "none"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_trains_with_every_pool_position_and_target(pool, positions, target, batch):
    encoder = ViT(tiny_config(pool=pool, positions=positions))
    objective = MaskedPatchPrediction(encoder, MaskedPatchConfig(target=target))
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("target", "bits", "classes"), [("mean_colour", 3, 512), ("colour_grid", 3, 512), ("mean_colour", 2, 64)]
)
def test_an_untrained_model_guesses_evenly(target, bits, classes, tiny_vit, batch):
    objective = MaskedPatchPrediction(tiny_vit, MaskedPatchConfig(target=target, bits=bits))
    assert objective(batch)[0].item() == pytest.approx(math.log(classes), rel=1e-5)


def test_ten_thousand_draws_keep_the_papers_shares(tiny_vit):
    draw = build(tiny_vit).draw(10_000, torch.device("cpu"))
    assert draw.patches.shape == (10_000, 12)
    assert (draw.patches.sort(1).values.diff(dim=1) > 0).all(), "the patches of an image are all different"
    chosen = torch.bincount(draw.patches.flatten(), minlength=24) / 10_000
    assert chosen.tolist() == pytest.approx([0.5] * 24, abs=4 * 0.5 / 100)  # four standard deviations
    for fate, share in [(MASKED, 0.8), (REPLACED, 0.1), (KEPT, 0.1)]:
        found = (draw.fate == fate).float().mean().item()
        assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 120_000))
    assert (draw.other != draw.patches).all(), "another patch is never the patch itself"
    others = torch.bincount(((draw.other - draw.patches) % 24).flatten(), minlength=24)[1:] / 120_000
    assert others.tolist() == pytest.approx([1 / 23] * 23, abs=4 * math.sqrt(1 / 23 / 120_000))


def test_corruption_is_the_drawn_one_patch_by_patch(tiny_vit):
    objective = build(tiny_vit)
    tokens = torch.randn(3, 24, 64)
    draw = objective.draw(3, torch.device("cpu"))
    fate = torch.tensor([MASKED, MASKED, REPLACED, REPLACED, KEPT, KEPT] * 2).expand(3, -1)
    corrupted = objective.corrupt(tokens, draw._replace(fate=fate))
    for b in range(3):
        places = dict(zip(draw.patches[b].tolist(), range(12), strict=True))
        for patch in range(24):
            expected = tokens[b, patch]
            if patch in places:
                k = places[patch]
                if fate[b, k] == MASKED:
                    expected = objective.mask_token
                elif fate[b, k] == REPLACED:
                    expected = tokens[b, draw.other[b, k]]
            assert torch.equal(corrupted[b, patch], expected)


@pytest.mark.parametrize("share", [0.01, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("split", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_any_share_and_split_can_be_set(share, split, tiny_vit, batch):
    objective = build(tiny_vit, share=share, split=split)
    draw = objective.draw(4, torch.device("cpu"))
    assert draw.patches.shape[1] == max(1, round(24 * share))
    tokens = torch.randn(4, 24, 64)
    changed = take(objective.corrupt(tokens, draw) != tokens, draw.patches).all(-1)
    assert changed.all() if split[2] == 0 else not changed.any()
    assert objective(batch)[0].isfinite()


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_counts_every_corrupted_patch_and_no_other(target, tiny_vit, batch):
    objective = build(tiny_vit, target=target)
    draw = objective.draw(4, torch.device("cpu"))
    # The slow way round: the whole encoder and the head everywhere, then the loss patch by patch.
    tokens = tiny_vit.patches(tiny_vit.encode(objective.corrupt(tiny_vit.embed(batch.images), draw)))
    outputs = objective.head(tokens)
    losses = []
    for b in range(4):
        for patch in draw.patches[b].tolist():
            output = outputs[b, patch]
            if target == "pixels":
                pixels = targets.patch_pixels(batch.images / 127.5 - 1, 8)[b, patch]
                losses.append(((output - pixels) ** 2).mean())
            elif target == "normalised_pixels":
                pixels = targets.patch_pixels(batch.images / 127.5 - 1, 8)[b, patch]
                pixels = (pixels - pixels.mean()) / (pixels.var(unbiased=True) + 1e-6).sqrt()
                losses.append(((output - pixels) ** 2).mean())
            elif target == "mean_colour":
                losses.append(F.cross_entropy(output, targets.mean_colour(batch.images, 8)[b, patch]))
            else:
                cells = targets.colour_grid(batch.images, 8)[b, patch]
                losses.append(F.cross_entropy(output.reshape(16, 512), cells))
    loss, _ = objective.compute(batch.images, draw)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_masked_patch_can_not_be_seen(tiny_vit, batch):
    objective = build(tiny_vit, split=(1.0, 0.0, 0.0))
    draw = objective.draw(4, torch.device("cpu"))
    hidden = targets.patch_pixels(batch.images, 8).scatter(1, draw.patches[..., None].expand(-1, -1, 192), 0)
    images = hidden.unflatten(1, (4, 6)).unflatten(-1, (8, 8, 3)).permute(0, 5, 1, 3, 2, 4).reshape(4, 3, 32, 48)
    torch.testing.assert_close(objective.predict(images, draw), objective.predict(batch.images, draw))


def test_the_first_guess_of_the_mask_token_is_learned(tiny_vit, batch):
    objective = build(tiny_vit)
    objective(batch)[0].backward()
    assert objective.mask_token.grad.any()
    assert all(parameter.grad is not None for parameter in objective.head.parameters())


def test_baselines_are_what_they_say(tiny_vit):
    objective = build(tiny_vit)
    images = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    images[:, :, :, 24:] = 255  # the left half black, the right half white
    index = torch.tensor([[0, 3, 4, 5, 9]])  # one black patch, four white ones
    draw = Draw(index, torch.zeros(1, 5), index)
    objective.head.weight.data.zero_()
    objective.head.bias.data[511] = 1  # it says white everywhere
    _, metrics = objective.compute(images, draw)
    # Visible neighbours: patch 1 of 0; 2 (black) of 3, before 9, which is hidden; 10 of 4; 11 of 5; 8 (black) of 9.
    assert {name: round(value.item(), 6) for name, value in metrics.items()} == {
        "accuracy": 0.8,
        "commonest": 0.8,
        "nearest": 0.6,
    }


@pytest.mark.parametrize("target", TARGETS)
def test_pictures_show_the_image_where_nothing_is_corrupted(target, tiny_vit, batch):
    objective = build(tiny_vit, target=target)
    torch.manual_seed(3)
    shown = objective.pictures(batch)
    torch.manual_seed(3)
    draw = objective.draw(4, torch.device("cpu"))
    assert list(shown) == ["input", "corrupted", "predicted", "truth"]
    visible = torch.ones(4, 24, dtype=torch.bool).scatter(1, draw.patches, False)
    for picture in shown.values():
        assert picture.dtype == torch.uint8
        assert torch.equal(targets.patch_pixels(picture, 8)[visible], targets.patch_pixels(batch.images, 8)[visible])
    assert torch.equal(shown["input"], batch.images)
    if target == "mean_colour":  # what is painted as truth has the true class
        assert torch.equal(targets.mean_colour(shown["truth"], 8), targets.mean_colour(batch.images, 8))
    if target == "colour_grid":
        hidden = ~visible
        assert torch.equal(targets.colour_grid(shown["truth"], 8)[hidden], targets.colour_grid(batch.images, 8)[hidden])
    if "pixels" in target:
        assert torch.equal(shown["truth"], batch.images)
    masked = draw.patches[draw.fate == MASKED]
    rows = torch.arange(4)[:, None].expand_as(draw.patches)[draw.fate == MASKED]
    checks = torch.where((torch.arange(32)[:, None] // 2 + torch.arange(48) // 2) % 2 == 1, 160, 96)
    expected = targets.patch_pixels(checks.expand(4, 3, -1, -1), 8)[rows, masked]
    assert torch.equal(targets.patch_pixels(shown["corrupted"], 8)[rows, masked].long(), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16_gives_nearly_the_same_loss_in_float32(target, tiny_vit, batch):
    objective = build(tiny_vit, target=target)
    draw = objective.draw(4, torch.device("cpu"))
    exact, _ = objective.compute(batch.images, draw)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective.compute(batch.images, draw)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_what_is_predicted_must_go_with_the_images():
    two = ViT(tiny_config(channels=2))
    with pytest.raises(ValueError, match=r"mean_colour needs images in colour or grey .* got 2\); pixels"):
        MaskedPatchPrediction(two)
    objective = build(two, target="pixels")
    images = torch.randint(0, 256, (2, 2, 32, 48), dtype=torch.uint8)
    loss, metrics = objective(Batch(images))
    assert loss.isfinite()
    assert metrics.keys() == {"psnr", "flat", "copied"}
    assert objective.pictures(Batch(images))["predicted"].shape == (2, 2, 32, 48)
    with pytest.raises(ValueError, match=r"objective.grid \(4\) must divide model.patch \(6\)"):
        MaskedPatchPrediction(ViT(tiny_config(image=(12, 12), patch=6)), MaskedPatchConfig(target="colour_grid"))
    with pytest.raises(ValueError, match="at least 2 patches"):
        MaskedPatchPrediction(ViT(tiny_config(image=(8, 8))))


@pytest.mark.parametrize(
    ("key", "value"), [("share", 0.0), ("share", 1.5), ("split", (0.8, 0.1, 0.2)), ("bits", 0), ("grid", 0)]
)
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"objective.{key}"):
        MaskedPatchConfig(**{key: value})


def test_the_nearest_patchs_pixels_are_a_guess_beside_predicted_ones(batch):
    objective = build(ViT(tiny_config()), target="pixels")
    draw = objective.draw(len(batch), batch.images.device)
    metrics = objective.compute(batch.images, draw)[1]
    errors = []
    for image, hidden in zip(batch.images.double() / 255, draw.patches.tolist(), strict=True):
        patches = (
            image.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2).transpose(0, 1)
        )  # (n, c, 8, 8), patches of 8 pixels
        seen = [n for n in range(24) if n not in hidden]
        for n in hidden:
            near = min(seen, key=lambda m: ((n // 6 - m // 6) ** 2 + (n % 6 - m % 6) ** 2, m))
            errors.append((patches[near] - patches[n]).square().mean())
    assert metrics["copied"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
