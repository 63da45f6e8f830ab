"""What the encoder is worth while it trains: the class of scored images by their nearest images to train on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpp.batch import Batch
from mpp.data.batches import Batches
from mpp.knn import K, knn_predictions
from mpp.objectives.base import Objective
from mpp.ranks import here
from mpp.shards.index import ShardError
from mpp.split import let_go, uncompiled
from mpp.train_config import Execution


class Neighbours:
    """Scores the encoder that would be the result by the protocol knn (mpp/knn.py), with 20 neighbours.

    scored: the images whose classes are told. known: the labelled images to train on that tell them. Several processes
    share the images, and then each has the vectors of all.
    """

    def __init__(
        self, objective: Objective, scored: Batches, known: Batches, execution: Execution, device: torch.device
    ) -> None:
        self.objective, self.scored, self.known = objective, scored, known
        self.execution, self.device, self.ranks = execution, device, here()

    def vectors(self, batch: Batch, own: int, joined: bool) -> Batch:
        """The vectors (b, width) and labels of a batch's first `own` images and of those of the other processes.

        joined: every process has the whole batch already.
        """
        assert batch.labels is not None, "shards without labels were refused"
        lowered = torch.autocast(self.device.type, torch.bfloat16, enabled=self.execution.precision == "bfloat16")
        with torch.no_grad(), lowered, uncompiled():
            vectors = self.objective.vectors(batch.images).float()
        let_go(self.objective)
        found = Batch(vectors[:own], batch.labels[:own])
        return found if joined else self.ranks.joined(found)

    def score(self, queries: Sequence[Batch], stop: Sequence[int]) -> float | None:
        """The share of queries, vectors with labels, whose class their neighbours tell; None if asked to stop."""
        found, read = list[Batch](), self.known.iterate(0, stop)
        for _ in range(len(self.known)):
            batch = next(read, None)
            turn = self.ranks.turn(stop, batch)
            if batch is None or turn.ended or turn.stop:
                return None
            if turn.images:
                own = len(batch)
                found.append(self.vectors((batch if own else batch.blank(2)).to(self.device), own, False))
        known, known_labels = labelled(found, self.known)
        vectors, labels = labelled(queries, self.scored)

        def right() -> float:
            [guess] = knn_predictions(known, known_labels, vectors, [K])
            return (guess == labels.cpu()).double().mean().item()

        return self.ranks.shared(right)


def labelled(parts: Sequence[Batch], batches: Batches) -> tuple[Tensor, Tensor]:
    """The vectors (n, width) and labels (n,) of those that have a label; ShardError where none has."""
    labels = [part.labels for part in parts if part.labels is not None]
    if not any((some >= 0).any() for some in labels):
        raise ShardError(f"{batches.index.origin}: every labelled image that eval.knn takes is damaged")
    vectors, numbers = torch.cat([part.images for part in parts]), torch.cat(labels)
    return vectors[numbers >= 0], numbers[numbers >= 0]
