"""Draws by hash: the numbers of seeds.py, whatever the batch, the device or torch.compile; and that they are random."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch._dynamo.testing import CompileCounterWithBackend

from mpp import draws
from mpp.seeds import mix

CPU = torch.device("cpu")
GOLDEN = 0x9E3779B97F4A7C15


def of(images: int, step: int = 1, seed: int = 0) -> torch.Tensor:
    return draws.keys_of(seed, step, np.arange(images))


def splitmix(state: int, count: int) -> list[int]:
    """The generator as its authors publish it (splitmix64.c), in Python's whole numbers."""
    found = []
    for _ in range(count):
        state = (state + GOLDEN) % 2**64
        word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append(word ^ (word >> 31))
    return found


def test_each_key_begins_a_stream_of_splitmix64():
    keys = of(5)
    found = draws.words(keys, 7).numpy().view(np.uint64).tolist()
    assert found == [splitmix(key * GOLDEN % 2**64, 7) for key in keys.numpy().view(np.uint64).tolist()]


def test_keys_are_hashes_of_seed_step_and_place():
    found = draws.keys_of(3, 9, np.array([4, 0, 7]))[:-1].numpy().view(np.uint64)
    assert found.tolist() == mix(3, 9, np.array([4, 0, 7])).tolist()


def test_numbers_follow_from_words_as_whole_numbers_say():
    words = splitmix(12345 * GOLDEN % 2**64, 400)
    key = torch.tensor([12345])
    assert draws.uniform(key, 400)[0].tolist() == [(word >> 40) / 2**24 for word in words]
    assert draws.below(key, 400, 195)[0].tolist() == [((word >> 33) * 195) >> 31 for word in words]
    lanes = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    signed = [lane - 2**16 if lane >= 2**15 else lane for lane in lanes]
    assert draws.hits(key, 1600, 0.3)[0].tolist() == [lane < round(0.3 * 2**16) - 2**15 for lane in signed]


def test_draws_are_uniform_and_independent_between_images_parts_and_steps():
    keys = of(200)[:-1]
    parts = [draws.apart(keys, number) for number in (0, 1)]
    numbers = [draws.uniform(part, 100).numpy() for part in parts]
    assert kstest(numbers[0].ravel(), "uniform").pvalue > 1e-3
    assert chisquare(np.bincount(draws.below(keys, 500, 7).numpy().ravel())).pvalue > 1e-3
    spread = 4 / np.sqrt(20_000)  # of a correlation of so many pairs, four standard deviations
    first, second = (one.ravel() for one in numbers)
    later = draws.uniform(of(200, step=2)[:-1], 100).numpy().ravel()
    neighbour = np.roll(numbers[0], 1, axis=0).ravel()
    for other in (second, later, neighbour):
        assert abs(np.corrcoef(first, other)[0, 1]) < spread


@pytest.mark.parametrize("chance", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
def test_hits_happen_by_their_chance(chance):
    share = draws.hits(of(100)[:-1], 1001, chance).float().mean().item()
    assert share == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 100_100))
    assert abs(draws.rounded(chance) - chance) <= 2**-17


def test_of_what_is_nearly_certain_something_is_left():
    assert draws.rounded(1 - 1e-9) == 1 - 2**-16
    assert 0 < (~draws.hits(of(1000)[:-1], 1001, 1 - 1e-9)).sum() < 50


def test_an_image_draws_the_same_in_any_part_of_the_batch():
    def drawn(places: np.ndarray) -> list[torch.Tensor]:
        with draws.drawing(draws.keys_of(0, 5, places)):
            calls = [draws.keys(len(places), CPU) for _ in range(3)]
            return [*calls, draws.batch_keys(CPU).expand(len(places))]

    whole = drawn(np.arange(12))
    for part in (np.arange(4, 8), np.array([11, 2]), np.array([6])):
        for found, expected in zip(drawn(part), whole, strict=True):
            assert torch.equal(found, expected[torch.from_numpy(part)])
    assert len({int(keys[0]) for keys in whole}) == 4, "each call gives other keys"


def test_views_behind_one_another_draw_apart_and_as_their_images_stand():
    def drawn(places: np.ndarray) -> torch.Tensor:
        with draws.drawing(draws.keys_of(0, 5, places)):
            return draws.keys(2 * len(places), CPU).view(2, -1)

    whole = drawn(np.arange(6))
    assert len(whole.unique()) == 12
    assert torch.equal(drawn(np.arange(2, 5)), whole[:, 2:5])
    with draws.drawing(of(4)), pytest.raises(ValueError, match="6 rows can't draw as 4 images do"):
        draws.keys(6, CPU)


def test_outside_of_a_step_keys_come_from_torchs_generator():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(torch.cat([draws.keys(3, CPU), draws.batch_keys(CPU)]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_draws_are_the_same(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")

    def drawn(rows: int, place: torch.device) -> list[torch.Tensor]:
        keys, again = draws.keys(rows, place), draws.keys(2 * rows, place)
        return [
            draws.words(keys, 50).argsort(1), draws.uniform(again, 9), draws.below(keys, 9, 63),
            draws.hits(draws.apart(keys, 3), 30, 0.3), draws.batch_keys(place),
        ]  # fmt: skip

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(drawn, backend=backend, fullgraph=True, dynamic=False)
    for step in range(3):
        with draws.drawing(of(8, step)):
            expected = drawn(8, torch.device("cpu"))
        with draws.drawing(of(8, step).to(device)):
            found = compiled(8, torch.device(device))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.cpu(), other)
    assert backend.frame_count == 1
