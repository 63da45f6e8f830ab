import numpy as np
import pytest
import torch
from feature_clouds import clouds

import mpp.eval
from mpp import knn
from mpp.eval.probes.knn import knn_accuracy
from mpp.knn import knn_predictions


def slowly(train, labels, test, k, temperature):
    """Each test image by itself, in plain float64 numpy; ties as the module says."""
    train, test = train.double().numpy(), test.double().numpy()
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    found = []
    for query in test:
        similarity = (train * (query / np.linalg.norm(query))).sum(1)
        nearest = sorted(range(len(train)), key=lambda i: (-similarity[i], i))[:k]
        votes = [0.0] * (int(labels.max()) + 1)
        for i in nearest:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        found.append(int(np.argmax(votes)))
    return torch.tensor(found)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_predictions_are_those_of_a_slow_plain_version(temperature):
    (x, y), (test, truth) = clouds(700, 5), clouds(200, 5, seed=1)
    x, test = x - 5, test - 5
    ks = (10, 20, 100, 200)
    found = knn_predictions(x, y, test, ks, temperature=temperature)
    for k, guess in zip(ks, found, strict=True):
        assert torch.equal(guess, slowly(x, y, test, k, temperature)), k
        accuracy = knn_accuracy(x, y, test, truth, k=k, temperature=temperature)
        assert accuracy == (guess == truth).double().mean().item()
        assert 0.25 < accuracy < 0.95
    assert len({tuple(guess.tolist()) for guess in found}) == 4, "k matters here"


def test_the_size_of_blocks_does_not_matter(monkeypatch):
    (x, y), (test, _) = clouds(300, 5), clouds(50, 5, seed=1)
    expected = knn_predictions(x, y, test, (10, 50))
    for test_block, train_block in ((7, 11), (1, 300), (50, 64)):
        monkeypatch.setattr(knn, "TEST_BLOCK", test_block)
        monkeypatch.setattr(knn, "TRAIN_BLOCK", train_block)
        assert torch.equal(knn_predictions(x, y, test, (10, 50)), expected)


def test_the_earlier_of_equal_images_votes_and_the_smaller_of_equal_labels_wins(monkeypatch):
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])  # the first three have one direction
    y = torch.tensor([2, 1, 1, 0])
    query = torch.tensor([[5.0, 0.0]])
    for train_block in (1, 2, 100):
        monkeypatch.setattr(knn, "TRAIN_BLOCK", train_block)
        assert knn_predictions(x, y, query, (1, 2, 3)).flatten().tolist() == [2, 1, 1]


def test_more_neighbours_than_images_means_all_of_them():
    (x, y), (test, _) = clouds(30, 3), clouds(20, 3, seed=1)
    found = knn_predictions(x, y, test, (30, 200))
    assert torch.equal(found[0], found[1])
    one = torch.eye(3)
    assert knn_accuracy(one, torch.arange(3), one, torch.arange(3), k=200) == 1


def test_features_without_direction_and_half_precision_do_no_harm():
    (x, y), (test, _) = clouds(50, 3), clouds(20, 3, seed=1)
    x[0], test[0] = 0, 0
    assert knn_predictions(x.half(), y, test.half(), (10,)).shape == (1, 20)


def test_the_public_name_is_this_function():
    assert mpp.eval.knn_accuracy is knn_accuracy
