import numpy as np
import pytest
import torch
from feature_clouds import clouds

import mpp.eval
from mpp.eval.probes.few_shot import L2, SHOTS, drawn, few_shot, few_shot_accuracy, few_shot_predictions


def slowly(train, labels, test, l2):
    """big_vision's recipe in plain numpy: the normal equations, solved."""
    x, test, labels = train.double().numpy(), test.double().numpy(), labels.numpy()
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = np.hstack([(x - mean) / std, np.full((len(x), 1), 100.0)])
    target = -np.ones((len(x), labels.max() + 1))
    target[np.arange(len(x)), labels] = 1
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ target)
    test = np.hstack([(test - mean) / std, np.full((len(test), 1), 100.0)])
    return torch.from_numpy((test @ weights).argmax(1))


@pytest.mark.parametrize("images", [12, 500])  # fewer than features, and more
def test_predictions_are_those_of_a_slow_plain_version(images):
    (x, y), (test, truth) = clouds(images, 4, width=30), clouds(400, 4, width=30, seed=1)
    l2s = (2.0**-3, 2.0**4, L2)
    found = few_shot_predictions(x, y, test, l2s)
    for l2, guess in zip(l2s, found, strict=True):
        assert torch.equal(guess, slowly(x, y, test, l2))
        assert few_shot_accuracy(x, y, test, truth, l2=l2) == (guess == truth).double().mean().item()
    assert not torch.equal(found[0], found[2]), "l2 matters here"


def test_the_settings_are_big_visions():
    assert L2 == 1024
    assert SHOTS == (1, 5, 10, 25)


def test_accuracies_are_those_of_the_drawn_shots():
    (x, y), (test, truth) = clouds(300, 3), clouds(200, 3, seed=1)
    found = few_shot(x, y, test, truth, shots=(1, 5), l2s=(1.0, L2), draws=2)
    assert [(one.shots, one.l2) for one in found] == [(1, 1.0), (1, L2), (5, 1.0), (5, L2)]
    for one in found:
        for draw, accuracy in enumerate(one.accuracies):
            rows = drawn(y, one.shots, draw)
            assert torch.bincount(y[rows]).tolist() == [one.shots] * 3
            assert accuracy == (slowly(x[rows], y[rows], test, one.l2) == truth).double().mean().item()
        assert one.accuracy == np.mean(one.accuracies)
    assert len({one.accuracies for one in found}) > 1


def test_draws_differ_are_repeated_and_grow_from_each_other():
    y = torch.arange(300) % 3
    assert torch.equal(drawn(y, 5, 0), drawn(y, 5, 0))
    assert set(drawn(y, 5, 0).tolist()) != set(drawn(y, 5, 1).tolist())
    assert set(drawn(y, 5, 0).tolist()) < set(drawn(y, 10, 0).tolist())


def test_shots_that_a_class_lacks_are_left_out_and_one_image_a_class_works():
    (x, y), (test, truth) = clouds(300, 3), clouds(200, 3, seed=1)
    rows = torch.cat([(y == label).nonzero().flatten()[:count] for label, count in enumerate((30, 30, 7))])
    assert [one.shots for one in few_shot(x[rows], y[rows], test, truth)] == [1, 5]
    rows = drawn(y, 1, 0)
    [one] = few_shot(x[rows], y[rows], test, truth)
    assert one.shots == 1
    assert len(set(one.accuracies)) == 1, "there is only one draw of one image each"


def test_the_public_name_is_this_function():
    assert mpp.eval.few_shot_accuracy is few_shot_accuracy
