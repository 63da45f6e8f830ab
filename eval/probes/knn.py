"""The protocol knn: the weighted vote of nearest neighbours (mpp/knn.py) at several numbers of them."""

from torch import Tensor

from mpp.knn import TEMPERATURE, K, knn_predictions

from .given import check_above, check_given
from .task import Row, Task

KS = (10, 20, 100, 200)


def rows(task: Task) -> list[Row]:
    """The accuracy for each number of neighbours."""
    train, made = task.train, list[Row]()
    for name in train.vector_parts:
        guesses = knn_predictions(train.parts[name], train.labels, task.test.parts[name], KS)
        for k, guess in zip(KS, guesses, strict=True):
            metric = ("top1" if k == K else f"k={k}") + ("" if name == train.output else ", average patch")
            made.append(Row("knn", metric, task.accuracy(guess), {"features": name, "k": min(k, len(train))}))
    return made


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int, temperature: float = TEMPERATURE
) -> float:
    """The share of test images whose k nearest training images vote for their label; features (n, d), labels (n,).

    Raises ValueError for features that are not finite or of another shape, and for labels that number no class.
    """
    check_given(train, train_labels, test, test_labels)
    check_above("k", k)
    check_above("temperature", temperature)
    [guess] = knn_predictions(train, train_labels, test, [k], temperature=temperature)
    return (guess == test_labels).double().mean().item()
