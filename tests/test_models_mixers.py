import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken

from mpp.models.layers import take
from mpp.models.mixers import MIXERS, OnGrid, Places, attend
from mpp.models.trunk_config import ATTEND, MIXER_NAMES, ON_GRID, TrunkConfig

GRID, WIDTH, CONTEXT = (4, 6), 64, 24


def mixer_of(name: str, **changes):
    mixer = MIXERS[name](
        TrunkConfig(**{"width": WIDTH, "depth": 2, "heads": 2, "mixer": (name,)} | changes), GRID, CONTEXT
    )
    mixer.initialise()
    return shaken(mixer)


def tokens_of(prefix: int = 0) -> torch.Tensor:
    return torch.randn(2, prefix + GRID[0] * GRID[1], WIDTH)


def test_the_table_holds_what_the_config_knows():
    assert tuple(MIXERS) == MIXER_NAMES
    assert set(ON_GRID) == {name for name, mixer in MIXERS.items() if issubclass(mixer, OnGrid)}
    assert set(ATTEND) < set(MIXERS)


def test_pooling_is_the_average_of_the_neighbours_minus_the_patch_itself():
    tokens = tokens_of()
    maps = tokens.numpy().reshape(2, *GRID, WIDTH)
    expected = np.zeros_like(maps)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            window = maps[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            expected[:, row, column] = window.mean((1, 2)) - maps[:, row, column]
    found = mixer_of("pool")(tokens, Places(GRID, 0))
    np.testing.assert_allclose(found.numpy(), expected.reshape(2, -1, WIDTH), atol=1e-6)


def test_pooling_in_bfloat16_is_as_near_as_bfloat16_can_be():
    tokens = tokens_of().bfloat16()
    exact = mixer_of("pool")(tokens.double(), Places(GRID, 0))
    found = mixer_of("pool")(tokens, Places(GRID, 0))
    assert (found - exact).abs().max() < 4 * 2**-8, "two roundings of sums up to about 4"


def test_the_convolution_is_each_channels_own_window():
    mixer, tokens = mixer_of("conv"), tokens_of()
    maps = np.pad(tokens.numpy().reshape(2, *GRID, WIDTH), ((0, 0), (3, 3), (3, 3), (0, 0)))
    weight, bias = mixer.conv.weight.detach().numpy(), mixer.conv.bias.detach().numpy()  # (d, 1, 7, 7), (d,)
    expected = np.zeros((2, *GRID, WIDTH))
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            window = maps[:, row : row + 7, column : column + 7]  # (b, 7, 7, d)
            expected[:, row, column] = np.einsum("bhwd,dhw->bd", window, weight[:, 0]) + bias
    found = mixer(tokens, Places(GRID, 0)).detach().numpy()
    np.testing.assert_allclose(found, expected.reshape(2, -1, WIDTH), atol=1e-5)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_token_mlp_maps_across_patches_channel_by_channel(gelu):
    mixer, tokens = mixer_of("mlp", gelu=gelu), tokens_of()
    assert mixer.expand.weight.shape == (WIDTH // 2, 24)
    found = mixer(tokens, Places(GRID, 0))
    approximate = "tanh" if gelu == "tanh" else "none"
    for channel in (0, 17, 63):
        hidden = F.gelu(tokens[:, :, channel] @ mixer.expand.weight.T + mixer.expand.bias, approximate=approximate)
        expected = hidden @ mixer.contract.weight.T + mixer.contract.bias
        torch.testing.assert_close(found[:, :, channel], expected)


def test_the_token_mlp_refuses_another_grid():
    with pytest.raises(ValueError, match="grid of 4x6 patches only, got images of 3x8"):
        mixer_of("mlp")(tokens_of(), Places((3, 8), 0))


@pytest.mark.parametrize("name", ON_GRID)
def test_what_stands_in_front_of_the_patches_gets_nothing_from_mixers_of_the_grid(name):
    mixer, tokens = mixer_of(name), tokens_of(prefix=3)
    found = mixer(tokens, Places(GRID, 3))
    assert not found[:, :3].any()
    torch.testing.assert_close(found[:, 3:], mixer(tokens[:, 3:], Places(GRID, 0)))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("name", MIXERS)
def test_outputs_asked_for_are_those_of_the_whole(name, prefix):
    mixer, tokens = mixer_of(name), tokens_of(prefix)
    n = prefix + 24
    # The same for all images, as fixed positions have it, and each image's own, as where patches are dropped.
    for images in (1, 2):
        angles = torch.randn(images, 1, n, 32) if name in ATTEND else None
        bias = torch.randn(images, 2, n, n) if name == "attention" else None
        context = (torch.randn(2, 9, CONTEXT), torch.randn(2, 1, 9, 32)) if name == "cross" else (None, None)
        places = Places(GRID, prefix, angles, bias, *context)
        at = torch.rand(2, n).argsort(1)[:, :7]
        whole = mixer(tokens, places)
        torch.testing.assert_close(mixer(tokens, places, at), take(whole, at), atol=1e-5, rtol=1e-5)
        assert not torch.equal(whole, mixer(tokens.flip(1), places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_added_to_the_scores(dtype):
    q, k, v = torch.randn(3, 2, 2, 5, 8).to(dtype)
    bias = torch.randn(1, 2, 5, 5).to(dtype)
    scores = q.double() @ k.double().transpose(2, 3) / 8**0.5 + bias.double()
    expected = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v.double()
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, atol=tolerance, rtol=tolerance)


def test_attention_keeps_memory_linear_in_the_tokens():
    def kept(tokens: int) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        q, k, v = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attend(q, k, v)
        return sum(sizes.values())

    assert kept(4096) < 4.1 * kept(1024)
