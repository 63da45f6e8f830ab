import pytest
import torch
import torch.nn.functional as F
from feature_clouds import clouds
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mpp.eval.probes import logistic
from mpp.eval.probes.logistic import cross_entropy, fit, principal_axes

CPU = torch.device("cpu")
GRID = (1.0, 1e-2, 1e-4, 1e-6)


def logits_of(x, y, seen, l2s):
    """Our logits (l2, m, classes) for `seen`, fitted to x and y."""
    axes = principal_axes([x], torch.arange(len(x)), CPU)
    weights = fit(axes.coordinates([x], slice(None)), y, int(y.max()) + 1, axes.curvature, l2s)
    return axes.coordinates([seen], slice(None)).double() @ weights


def reference(x, y, seen, l2):
    """scikit-learn's probabilities (m, classes) at the same regularisation, solved to far beyond its default."""
    scaler, classes = StandardScaler().fit(x.double().numpy()), int(y.max()) + 1
    strength = (2 if classes == 2 else 1) / (l2 * len(x))
    model = LogisticRegression(C=strength, tol=1e-9, max_iter=50_000)
    model.fit(scaler.transform(x.double().numpy()), y.numpy())
    return torch.from_numpy(model.predict_proba(scaler.transform(seen.double().numpy())))


@pytest.mark.parametrize("classes", [2, 6])
def test_it_finds_scikit_learns_optimum_over_the_whole_grid(classes):
    (x, y), (seen, truth) = clouds(2000, classes), clouds(3000, classes, seed=1)
    for l2, logits in zip(GRID, logits_of(x, y, seen, GRID), strict=True):
        expected = reference(x, y, seen, l2)
        assert (logits.softmax(1) - expected).abs().max() < 5e-3
        accuracy, theirs = ((guess.argmax(1) == truth).double().mean() for guess in (logits, expected))
        assert abs(accuracy - theirs) <= 1e-3
        assert 0.35 < theirs < 0.95, "neither guessing nor so easy that all would agree"


def test_with_fewer_images_than_features_too():
    (x, y), (seen, _) = clouds(60, 3, width=150), clouds(500, 3, width=150, seed=1)
    for l2, logits in zip((1.0, 1e-2), logits_of(x, y, seen, (1.0, 1e-2)), strict=True):
        assert (logits.softmax(1) - reference(x, y, seen, l2)).abs().max() < 5e-3


def test_rare_classes_are_fitted_as_well():
    (x, y), (seen, _) = clouds(2000, 4), clouds(500, 4, seed=1)
    rows = torch.cat([(y != 3).nonzero().flatten(), (y == 3).nonzero().flatten()[:5]])
    [logits] = logits_of(x[rows], y[rows], seen, (1e-3,))
    assert (logits.softmax(1) - reference(x[rows], y[rows], seen, 1e-3)).abs().max() < 5e-3


def test_constant_and_repeated_features_change_nothing():
    (x, y), (seen, _) = clouds(500, 3), clouds(200, 3, seed=1)
    constant = torch.full((700, 2), 1234.5) + torch.tensor([0.0, 1e-4])
    wide, seen_wide = torch.cat([x, constant[:500]], 1), torch.cat([seen, constant[500:]], 1)
    expected = logits_of(x, y, seen, (1e-3,)).softmax(2)
    assert (logits_of(wide, y, seen_wide, (1e-3,)).softmax(2) - expected).abs().max() < 1e-3
    # Twice the same features are as good as half the penalty.
    twice = logits_of(torch.cat([x, x], 1), y, torch.cat([seen, seen], 1), (2e-3,)).softmax(2)
    assert (twice - expected).abs().max() < 2e-3


def test_the_loss_and_its_gradient_are_those_of_autograd(monkeypatch):
    x, y = torch.randn(50, 7), torch.randint(0, 4, (50,))
    weights = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([F.cross_entropy(x.double() @ weight, y) for weight in weights])
    expected.sum().backward()
    for block in (2**22, 100, 1):  # all rows at once, some, one at a time
        monkeypatch.setattr(logistic, "BLOCK", block)
        loss, gradient = cross_entropy(x, y, weights.detach())
        torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient, weights.grad, atol=1e-6, rtol=1e-5)


def test_what_fits_in_memory_together_does_not_matter(monkeypatch):
    (x, y), (seen, _) = clouds(500, 3), clouds(200, 3, seed=1)
    expected = logits_of(x, y, seen, GRID).softmax(2)
    monkeypatch.setattr(logistic, "WHOLE", 1)
    monkeypatch.setattr(logistic, "BLOCK", 100)
    assert (logits_of(x, y, seen, GRID).softmax(2) - expected).abs().max() < 2e-3


def test_principal_axes_are_uncorrelated_and_of_the_curvature_they_say():
    x, _ = clouds(3000, 5)
    axes = principal_axes([x[:, :12], x[:, 12:]], torch.arange(2000), CPU)
    found = axes.coordinates([x[:, :12], x[:, 12:]], slice(0, 2000)).double()
    torch.testing.assert_close(found.T @ found / 2000, axes.curvature.diag(), atol=1e-4, rtol=1e-3)
