"""MAE's decoder out of files of weights, against transformers' ViTMAEForPreTraining with the same numbers."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numpy_mae import sincos
from safetensors.torch import save_file
from tiny_runs import digests, run, write_recipe
from torch import Tensor

from mpp.models.decoder_config import DecoderConfig
from mpp.objectives.mae import MAE, Draw
from mpp.recipe import load_recipe
from mpp.run.start import at_start
from mpp.weights import WeightsError, load_encoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = f"""\
seed: 3
model: {{image: 16, patch: 4, width: 32, depth: 2, heads: 2, positions: sincos2d_mae, mean: {[*MEAN]}, std: {[*STD]}}}
objective: {{name: mae, decoder: {{width: 16, depth: 3, heads: 4}}}}
data: {{path: PATH, augment: {{crop: shift, pad: 2}}}}
train: {{steps: 6, warmup: 2, batch: 8, micro_batch: 8, lr: 1e-3, precision: float32, device: cpu,
  save_every: 2, keep: 9}}
log: {{every: 1, pictures: 0, tensorboard: false}}
"""
# What models_mae.py calls the parts of a block, and what transformers calls them.
BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
Tensors = dict[str, Tensor]


def official(theirs: Tensors) -> Tensors:
    """transformers' tensors under the names of models_mae.py."""
    found = {
        "cls_token": theirs["vit.embeddings.cls_token"],
        "pos_embed": theirs["vit.embeddings.position_embeddings"],
        "mask_token": theirs["decoder.mask_token"],
        "decoder_pos_embed": theirs["decoder.decoder_pos_embed"],
    }
    modules = {"patch_embed.proj": ("vit.embeddings.patch_embeddings.projection",), "norm": ("vit.layernorm",)}
    modules |= {f"decoder_{part}": (f"decoder.decoder_{part}",) for part in ("embed", "norm", "pred")}
    for ours, them, depth in (("blocks", "vit.layers", 2), ("decoder_blocks", "decoder.decoder_layers", 3)):
        for number in range(depth):
            for name, parts in BLOCK.items():
                modules[f"{ours}.{number}.{name}"] = tuple(f"{them}.{number}.{part}" for part in parts)
    for name, parts in modules.items():
        for kind in ("weight", "bias"):
            found[f"{name}.{kind}"] = torch.cat([theirs[f"{part}.{kind}"] for part in parts])
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in theirs.values())
    return found


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> SimpleNamespace:
    """transformers' model, saved as its folder and as MAE's code saves a checkpoint, and its loss for some images."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("mae")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128}
    decoder = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTMAEConfig(
        **sizes,
        **{f"decoder_{name}": value for name, value in decoder.items()},
        num_attention_heads=2,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(5)
    model = transformers.ViTMAEForPreTraining(config)
    tables = {"vit.embeddings.position_embeddings": sincos(4, 32), "decoder.decoder_pos_embed": sincos(4, 16)}
    state = model.state_dict()
    for name, value in state.items():
        state[name] = (
            torch.from_numpy(tables[name]).float() if name in tables else value + 0.1 * torch.randn_like(value)
        )
    model.load_state_dict(state)
    model.save_pretrained(folder / "transformers")
    shutil.copytree(folder / "transformers", folder / "modules")  # with the names of older releases' files
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "modules" / "model.safetensors")
    tensors = official(model.state_dict())
    torch.save({"model": tensors}, folder / "full.pth")
    torch.save(
        {"model": {k: v for k, v in tensors.items() if "decoder" not in k and k != "mask_token"}}, folder / "bare.pth"
    )
    images, noise = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), torch.rand(3, 16)
    mean, std = (torch.tensor(value).double().view(3, 1, 1) for value in (MEAN, STD))
    loss = model.double()(pixel_values=(images.double() / 255 - mean) / std, noise=noise).loss
    order = noise.argsort(1)
    return SimpleNamespace(
        folder=folder, tensors=tensors, images=images, draw=Draw(order[:, :4], order[:, 4:]), loss=loss
    )


def begun(folder: Path, weights: Path, *changes: str) -> MAE:
    """The objective of a recipe that starts from a file, before its first step."""
    recipe = load_recipe(write_recipe(folder, folder, RECIPE), list(changes))
    objective = at_start(replace(recipe, weights=str(weights)))
    assert isinstance(objective, MAE)
    return objective


def changed(theirs: SimpleNamespace, folder: Path, tensors: dict[str, Tensor | None]) -> Path:
    """The file in MAE's names with some other tensors, or without them."""
    found = {name: value for name, value in {**theirs.tensors, **tensors}.items() if value is not None}
    torch.save({"model": found}, folder / "changed.pth")
    return folder / "changed.pth"


@pytest.mark.parametrize("file", ["full.pth", "transformers", "modules"])
def test_a_whole_model_gives_the_loss_that_transformers_has(theirs, tmp_path, file):
    objective = begun(tmp_path, theirs.folder / file).double()
    loss, _ = objective.compute(theirs.images, theirs.draw)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    new = begun(tmp_path, theirs.folder / "bare.pth").double()
    assert new.compute(theirs.images, theirs.draw)[0].item() != pytest.approx(loss.item(), rel=1e-3)


@pytest.fixture(autouse=True)
def published_size(monkeypatch):
    """Makes the encoder here one of the published models' sizes, of which heads are known."""
    monkeypatch.setattr("mpp.weights.format.HEADS", {(32, 2): 2})


def test_nothing_of_a_file_is_left_aside_and_a_bare_one_is_said_to_be(theirs, tmp_path, caplog):
    caplog.set_level("INFO")
    begun(tmp_path, theirs.folder / "full.pth")
    assert not [line for line in caplog.messages if "left aside" in line or "anew" in line]
    begun(tmp_path, theirs.folder / "bare.pth")
    anew = f"{theirs.folder / 'bare.pth'}: holds no decoder beside its encoder; that of the objective starts anew"
    assert [line for line in caplog.messages if "decoder" in line] == [anew]
    beside = {name for name in theirs.tensors if name.startswith("decoder_") or name == "mask_token"}
    assert set(load_encoder(theirs.folder / "full.pth").left_aside) == beside, "by itself an encoder leaves them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["objective.decoder.width=32"],
            "objective.decoder.width 16 there, 32 here; objective.decoder.mlp 64 there, 128 here",
        ),
        (["objective.decoder.depth=2"], "objective.decoder.depth 3 there, 2 here; .*: objective.decoder.depth=3$"),
        (["objective.decoder.mlp=32"], "objective.decoder.mlp 64 there, 32 here"),
        (["objective.decoder.positions=sincos2d"], "objective.decoder.positions sincos2d_mae there, sincos2d here"),
        (
            ["objective.decoder.swiglu=true", "objective.decoder.mlp=64"],
            "objective.decoder.swiglu False there, True here",
        ),
        (["objective.decoder.mixer=[attention,identity]"], r"objective.decoder.mixer \('attention',\) there"),
        (["objective.decoder.norm_eps=1e-5"], "objective.decoder.norm_eps 1e-06 there, 1e-05 here"),
        (
            ["model.patch=8"],
            r"its decoder: decoder_pred.weight \(48, 16\) where \(192, 16\) for head.weight was expected",
        ),
    ],
)
def test_another_decoder_is_refused_in_one_line_with_what_it_is_there(theirs, tmp_path, changes, message):
    with pytest.raises(WeightsError, match=f"^[^\n]*full.pth: mae: [^\n]*{message}"):
        begun(tmp_path, theirs.folder / "full.pth", *changes)


def test_heads_are_compared_where_a_config_tells_them(theirs, tmp_path):
    with pytest.raises(WeightsError, match="objective.decoder.heads 4 there, 2 here; to have it as there: obj"):
        begun(tmp_path, theirs.folder / "transformers", "objective.decoder.heads=2")
    begun(tmp_path, theirs.folder / "full.pth", "objective.decoder.heads=2")  # of what tells none they are as asked


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mask_token": None}, "its decoder: mask_token missing"),
        ({"decoder_embed.weight": None}, "its decoder: decoder_embed.weight missing"),
        ({"decoder_blocks.1.attn.proj.bias": None}, "its decoder: decoder_blocks.1.attn.proj.bias missing"),
        (
            {"decoder_blocks.1.attn.q_norm.weight": torch.ones(4)},
            "its decoder: decoder_blocks.1.attn.q_norm.weight unex",
        ),
        ({"decoder_norm.bias": torch.full((16,), torch.nan)}, "decoder_norm.bias: 16 of 16 numbers are not finite"),
        ({"decoder_pos_embed": torch.zeros(1, 17, 16)}, "decoder.positions none there, sincos2d_mae here"),
        (
            {"decoder_pos_embed": torch.ones(1, 17, 16)},
            "its decoder: decoder_pos_embed has a position for the class",
        ),
        (
            {"decoder_pos_embed": torch.cat([torch.zeros(1, 1, 16), torch.randn(1, 16, 16)], 1)},
            "positions learned there, sincos2d_mae here; to have it as there: objective.decoder.positions=learned",
        ),
    ],
)
def test_a_broken_decoder_is_refused_by_its_tensor_and_its_encoder_still_read(theirs, tmp_path, tensors, message):
    path = changed(theirs, tmp_path, tensors)
    with pytest.raises(WeightsError, match=f"^[^\n]*changed.pth: mae: [^\n]*{message}[^\n]*$"):
        begun(tmp_path, path)
    assert load_encoder(path).config.width == 32


def test_a_decoder_of_learned_positions_takes_the_table_whatever_it_holds(theirs, tmp_path):
    learned = torch.cat([torch.zeros(1, 1, 16), torch.randn(1, 16, 16)], 1)
    for table in (theirs.tensors["decoder_pos_embed"], learned):
        path = changed(theirs, tmp_path, {"decoder_pos_embed": table})
        objective = begun(tmp_path, path, "objective.decoder.positions=learned")
        assert torch.equal(objective.decoder.trunk.positions.table, table[0, 1:])


def test_fixed_positions_are_taken_from_a_table_that_holds_them_and_from_no_other(theirs, tmp_path):
    half = theirs.tensors["pos_embed"].half()
    begun(tmp_path, changed(theirs, tmp_path, {"pos_embed": half}))
    begun(tmp_path, changed(theirs, tmp_path, {}), "model.positions=learned")
    for wrong in (theirs.tensors["pos_embed"].roll(1, 1), theirs.tensors["pos_embed"] + 0.01):
        path = changed(theirs, tmp_path, {"pos_embed": wrong})
        with pytest.raises(Exception, match=r"positions learned there, sincos2d_mae here"):
            begun(tmp_path, path)


def test_a_run_goes_on_from_a_whole_file_and_resumes_bit_for_bit(theirs, tmp_path, small_shards):
    recipe, out, file = write_recipe(tmp_path, small_shards, RECIPE), tmp_path / "run", theirs.folder / "full.pth"
    command = ["pretrain", recipe, "--from", file, f"out={out}"]
    done = run(*command)
    assert done.code == 0, done.err
    whole = digests(out, 6)
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoints/step-{step:08d}")
    (out / "encoder.safetensors").unlink()
    assert run(*command).code == 0
    assert digests(out, 6) == whole
    other = changed(theirs, tmp_path, {"mask_token": torch.ones(1, 1, 16)})  # the encoder is the same
    shutil.rmtree(out / "checkpoints/step-00000006")
    (out / "encoder.safetensors").unlink()
    assert "began from other weights" in run("pretrain", recipe, "--from", other, f"out={out}").line
    assert load_encoder(out).config.width == 32


def test_the_defaults_are_those_of_the_published_decoders():
    config = DecoderConfig()
    assert (config.width, config.depth, config.heads, config.positions) == (512, 8, 16, "sincos2d_mae")
