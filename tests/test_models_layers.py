import numpy as np
import pytest
import torch

from mpp.models.layers import put, take


def drawn(count: int) -> torch.Tensor:
    return torch.rand(3, 8).argsort(1)[:, :count]


def test_what_was_put_somewhere_is_taken_from_there_and_the_rest_stays():
    tokens, index, new = torch.randn(3, 8, 5), drawn(4), torch.randn(3, 4, 5)
    before, expected = tokens.clone(), tokens.numpy().copy()
    for image in range(3):
        for place, value in zip(index[image].tolist(), new[image].numpy(), strict=True):
            expected[image, place] = value
    found = put(tokens, index, new)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert torch.equal(take(found, index), new)
    assert torch.equal(put(tokens, index, take(tokens, index)), tokens)
    assert torch.equal(tokens, before), "a new tensor, not the given one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_single_vector_goes_everywhere_in_the_dtype_of_the_tokens(dtype):
    tokens, index, mask = torch.ones(3, 8, 5).to(dtype), drawn(4), torch.full((5,), 7.0, requires_grad=True)
    found = put(tokens, index, mask)
    assert found.dtype == dtype
    assert (found == 7).all(2).sum(1).tolist() == [4, 4, 4]
    if dtype.is_floating_point:
        found.sum().backward()
        assert mask.grad.tolist() == [12] * 5, "from every place where it stands"


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_row_at_a_time_is_gather_and_scatter_and_so_are_the_gradients(dtype):
    """Also where an index has a patch twice, of tokens that are no block of memory, and of a token for all places."""
    shapes = {"whole": (3, 8, 5), "turned": (3, 5, 8), "same": (1, 1, 5)}
    for name, shape in shapes.items():
        given, index, new = 9 * torch.rand(shape), torch.randint(0, 8, (3, 6)), drawn(4)
        found, slopes = [], []
        for ours in (True, False):
            leaf = given.to(dtype).requires_grad_(dtype.is_floating_point)
            tokens = leaf.transpose(1, 2) if name == "turned" else leaf.expand(3, 8, 5)
            wide = index.unsqueeze(2).expand(-1, -1, 5)
            taken = take(tokens, index) if ours else tokens.gather(1, wide)
            places, filling = new.unsqueeze(2).expand(-1, -1, 5), taken[:, :4]
            filled = put(tokens, new, filling) if ours else tokens.scatter(1, places, filling)
            found.append((taken, filled))
            if dtype.is_floating_point:
                (filled * torch.arange(120.0).view(3, 8, 5)).sum().backward()
                slopes.append(leaf.grad)
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        if slopes:
            torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_an_index_beyond_an_images_tokens_is_an_error_not_a_token_of_the_next_one(wrong):
    tokens, index = torch.randn(3, 8, 5), torch.tensor([[0, 1], [2, wrong], [3, 4]])
    for call in (lambda: take(tokens, index), lambda: put(tokens, index, torch.zeros(5))):
        with pytest.raises(RuntimeError, match="index"):
            call()
