import numpy as np
import pytest
import torch
from feature_clouds import clouds
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import mpp.eval
from mpp.eval.features.extract import ProbeError
from mpp.eval.probes import linear
from mpp.eval.probes.linear import L2, choices, linear_probe, tenths


def scikit_learns(x, y, seen, l2):
    """What scikit-learn's logistic regression at the same regularisation predicts."""
    scaler = StandardScaler().fit(x.numpy())
    model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-6, max_iter=20_000).fit(scaler.transform(x.numpy()), y)
    return torch.from_numpy(model.predict(scaler.transform(seen.numpy())))


def test_a_loop_over_scikit_learn_chooses_and_finds_the_same():
    (x, y), (test, truth) = clouds(4000, 5), clouds(4000, 5, seed=1)
    grid = (1.0, 1e-1, 1e-2, 1e-3)
    found = linear_probe(x, y, test, truth, l2s=grid)
    right = dict.fromkeys(grid, 0)
    folds = tenths(y)
    for fold in folds:
        rest = torch.from_numpy(np.setdiff1d(np.arange(4000), fold.numpy()))
        for l2 in grid:
            right[l2] += int((scikit_learns(x[rest], y[rest], x[fold], l2) == y[fold]).sum())
    assert found.held_out == pytest.approx(max(right.values()) / sum(map(len, folds)), abs=1e-3)
    assert right[found.l2] >= max(right.values()) - 2
    expected = (scikit_learns(x, y, test, found.l2) == truth).double().mean().item()
    assert found.accuracy == pytest.approx(expected, abs=1e-3)
    assert 0.3 < expected < 0.95


def blocks(images: int, seed: int):
    """Choices of features, of which only the second tells the classes apart."""
    features, labels = clouds(images, 4, seed=seed)
    noise = torch.randn(2, *features.shape, generator=torch.Generator().manual_seed(seed))
    return {"first": [noise[0]], "second": [features[:, :5], features[:, 5:]], "third": [noise[1]]}, labels


def test_the_features_that_tell_classes_apart_are_chosen():
    (x, y), (test, truth) = blocks(400, 0), blocks(300, 1)
    found = linear_probe(x, y, test, truth)
    assert found.choice == "second"
    assert found.l2 in L2
    assert found.accuracy > 0.5
    assert abs(found.accuracy - found.held_out) < 0.15
    assert set(found.tried) == set(x)
    assert max(found.tried.values()) == found.held_out


def test_the_choice_never_looks_at_the_test_images():
    (x, y), (test, truth) = blocks(400, 0), blocks(300, 1)
    found = linear_probe(x, y, test, truth)
    other = linear_probe(x, y, test, (truth + 1) % 4)
    assert (other.choice, other.l2, other.held_out) == (found.choice, found.l2, found.held_out)
    assert torch.equal(other.predictions, found.predictions)
    assert other.accuracy < found.accuracy - 0.2
    unlike = linear_probe(x, y, {name: [torch.randn_like(part) for part in parts] for name, parts in x.items()}, y)
    assert (unlike.choice, unlike.l2, unlike.held_out) == (found.choice, found.l2, found.held_out)


def test_images_that_choose_are_not_fitted_while_choosing():
    x, y = torch.randn(200, 500), torch.randint(0, 2, (200,))  # more features than images: fitted ones are all right
    found = linear_probe(x, y, x, y, l2s=(1e-4,))
    assert found.accuracy == 1
    assert found.held_out < 0.7


def test_of_equal_choices_the_first_and_most_regularised_is_taken():
    x, y = torch.eye(4).repeat(30, 1) * 10, torch.arange(4).repeat(30)
    found = linear_probe({"one": [x], "same": [x]}, y, {"one": [x], "same": [x]}, y, l2s=(1e-1, 1e-2, 1e-3))
    assert (found.accuracy, found.held_out, found.choice, found.l2) == (1, 1, "one", 1e-1)


def test_tenths_take_their_share_of_each_class(monkeypatch):
    labels = torch.tensor([0] * 500 + [1] * 100 + [2] * 3 + [3])[torch.randperm(604)]
    monkeypatch.setattr(linear, "ENOUGH", 1)
    [fold] = tenths(labels)
    assert torch.bincount(labels[fold], minlength=4).tolist()[:2] == [50, 10]
    monkeypatch.setattr(linear, "ENOUGH", 10_000)
    folds = tenths(labels)
    assert len(folds) == 10
    assert torch.bincount(labels[torch.cat(folds)]).tolist() == [500, 100, 3], "each once, but a class's only image"
    assert all(torch.bincount(labels[fold], minlength=4)[2] <= 1 for fold in folds)


def test_a_large_training_set_holds_out_one_tenth():
    labels = torch.arange(30_000) % 10
    [fold] = tenths(labels)
    assert torch.bincount(labels[fold]).tolist() == [300] * 10


def test_labels_may_have_gaps_and_test_images_of_other_classes_are_never_right():
    (x, y), (test, truth) = clouds(600, 3), clouds(300, 3, seed=1)
    names = torch.tensor([2, 5, 9])
    found = linear_probe(x, names[y], test, names[truth])
    assert found.accuracy == linear_probe(x, y, test, truth).accuracy
    assert [label for label, share in enumerate(found.per_class) if share is not None] == [2, 5, 9]
    more = linear_probe(x, names[y], torch.cat([test, test]), torch.cat([names[truth], torch.full_like(truth, 11)]))
    assert more.accuracy == pytest.approx(found.accuracy / 2)
    assert more.per_class[11] == 0


def test_accuracy_by_class_averages_to_the_accuracy():
    (x, y), (test, truth) = clouds(600, 3), clouds(300, 3, seed=1)
    found = linear_probe(x, y, test, truth)
    weights = torch.bincount(truth) / len(truth)
    assert sum(w * a for w, a in zip(weights.tolist(), found.per_class, strict=True)) == pytest.approx(found.accuracy)


def test_two_images_a_class_are_enough_and_one_is_refused():
    (x, y), (test, truth) = clouds(200, 3), clouds(100, 3, seed=1)
    rows = torch.cat([(y == label).nonzero().flatten()[:2] for label in range(3)])
    assert 0 <= linear_probe(x[rows], y[rows], test, truth).accuracy <= 1
    with pytest.raises(ProbeError, match="no class has two training images"):
        linear_probe(x[rows[::2]], y[rows[::2]], test, truth)


def test_choices_are_those_of_the_literature_and_every_blocks_average():
    parts = {f"{kind} {block}": torch.full((2, 1), block + (0.5 if kind == "class" else 0.0)) for block in range(1, 7)
             for kind in ("class", "average")}  # fmt: skip
    found = {name: torch.cat(chosen, 1)[0].tolist() for name, chosen in choices(parts).items()}
    assert found == {
        "class token, last block": [6.5],
        "average patch, last block": [6],
        "both, last block": [6.5, 6],
        "class token, last 4 blocks": [3.5, 4.5, 5.5, 6.5],
        "average patch, last 4 blocks": [3, 4, 5, 6],
        "both, last 4 blocks": [3.5, 3, 4.5, 4, 5.5, 5, 6.5, 6],
        **{f"average patch, block {block}": [block] for block in (5, 4, 3, 2, 1)},
    }
    without = {name: part for name, part in parts.items() if name.startswith("average")}
    assert list(choices(without))[:2] == ["average patch, last block", "average patch, last 4 blocks"]
    assert len(choices(without)) == 7
    assert list(choices({"average 1": parts["average 1"]})) == ["average patch, last block"]
    assert list(choices({"output": parts["average 1"]})) == ["output"]


def test_half_precision_features_are_as_good():
    (x, y), (test, truth) = clouds(1000, 4), clouds(1000, 4, seed=1)
    found = linear_probe(x.half(), y, test.half(), truth)
    assert found.accuracy == pytest.approx(linear_probe(x, y, test, truth).accuracy, abs=0.01)


def test_the_public_name_is_this_function():
    assert mpp.eval.linear_probe is linear_probe


def test_a_result_says_all_that_was_found():
    (x, y), (test, truth) = clouds(100, 2), clouds(100, 2, seed=1)
    found = linear_probe(x, y, test, truth)
    assert f"{100 * found.accuracy:.2f} %" in str(found)
    assert f"l2 {found.l2:g}" in str(found)
