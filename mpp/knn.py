"""DINO's weighted k-nearest-neighbour classifier (arXiv 2104.14294, appendix F.1; dino/eval_knn.py).

Features are scaled to length one, the k training images of the largest dot product vote, each with weight exp(dot
product / temperature), and the class with the most votes wins. Blocks of test images meet blocks of training images, so
that neither all similarities nor a copy of the training features need to be in memory.

Ties: of equally similar training images the earlier counts as nearer, of classes with equal votes the smaller label
wins. (Only where more than SPARE images are as similar as the k-th is it left open which of them vote.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

K = 20  # neighbours of the headline figure: DINO's choice
TEMPERATURE = 0.07
TEST_BLOCK, TRAIN_BLOCK = 1024, 16384  # images; 64 MiB of similarities
VOTES = 2**24  # counted at a time, for each test image and class: 128 MiB
SPARE = 16  # neighbours kept beyond k while float32 finds them; float64 then ranks them
SHORTEST = 1e-12  # features shorter than this are no direction: F.normalize's eps


def knn_predictions(
    train: Tensor, train_labels: Tensor, test: Tensor, ks: Sequence[int], *, temperature: float = TEMPERATURE
) -> Tensor:
    """The labels (k, m) of test features (m, d) for each number of neighbours; where there are fewer, all vote."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # with float64, which mps lacks
    present, labels = train_labels.to(device).unique(return_inverse=True)
    classes, guesses = len(present), []
    for queries in test.split(max(1, min(TEST_BLOCK, VOTES // classes))):
        queries = queries.to(device)
        similarity, rows = neighbours(train, queries, max(ks))
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # over the nearest's: no vote overflows
        votes = torch.zeros(len(queries), classes, dtype=torch.float64, device=device)
        done, of_k = 0, {}
        for k in sorted(set(ks)):
            votes.scatter_add_(1, labels[rows[:, done:k]], weights[:, done:k])
            done, of_k[k] = k, present[votes.argmax(1)]
        guesses.append(torch.stack([of_k[k] for k in ks]).cpu())
    return torch.cat(guesses, dim=1)


def neighbours(train: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `train` for each query (m, d), nearest first: float64 similarities and rows (m, k)."""
    short = unit(queries.float())
    best, rows = short.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=short.device)
    for start in range(0, len(train), TRAIN_BLOCK):
        block = unit(train[start : start + TRAIN_BLOCK].to(short.device).float())
        found, places = (short @ block.T).topk(min(k + SPARE, len(block)), dim=1)
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, places + start], dim=1)
        if best.shape[1] > k + SPARE:
            best, kept = best.topk(k + SPARE, dim=1)
            rows = rows.gather(1, kept)
    rows = rows.sort(dim=1).values  # so that the stable sort below puts the earlier of equals first
    exact = torch.stack([_exact(train, query, near) for query, near in zip(queries, rows, strict=True)])
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    return exact[:, :k], rows.gather(1, order)[:, :k]


def _exact(train: Tensor, query: Tensor, rows: Tensor) -> Tensor:
    """Similarities (k,) of one query (d,) and some rows of `train`, in float64; equal rows give equal numbers."""
    near = unit(train[rows.to(train.device)].to(query.device).double())
    return (near * unit(query.double())).sum(1)


def unit(features: Tensor) -> Tensor:
    """Features (..., d) scaled to length one."""
    return features / features.norm(dim=-1, keepdim=True).clamp(min=SHORTEST)
