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
