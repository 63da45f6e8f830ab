"""data2vec for images (arXiv 2202.03555; its code's engine_for_cyclical.py and modeling_cyclical.py)."""

import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.batch import Batch
from mpp.models.encoder import Encoder
from mpp.models.layers import take
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.data2vec_config import Data2VecConfig
from mpp.objectives.hiding import Hiding, embed_without, encoder_of_patches, mask_token
from mpp.objectives.painting import rows
from mpp.objectives.predicted import precise
from mpp.split import own_part

STD = 0.02  # of the head's first weights, which are cut at one deviation (modeling_cyclical.py)
EPS = 1e-5  # of the norms of targets (torch's default, which engine_for_cyclical.py takes)
DEVIATIONS = 2.0  # of a principal component that the colours of pictures span, to either side


class Data2Vec(Objective):
    """A student sees an image with patches hidden and predicts there what a teacher, who sees all of it, makes of it.

    The teacher is a running average of the student. Its last blocks' outputs are normalised without a learned scale,
    averaged, and normalised again; the student's head is one linear layer behind its final norm. The loss is the mean
    smooth L1 of hidden patches.
    """

    encoder: ViT
    teacher: ViT
    config: Data2VecConfig

    def __init__(self, encoder: Encoder, config: Data2VecConfig | None = None) -> None:
        config = config or Data2VecConfig()
        super().__init__(encoder, config)
        self.encoder = encoder_of_patches(encoder, config)
        shape = self.encoder.config
        if config.top > shape.depth:
            raise ValueError(f"objective.top ({config.top}) must be at most model.depth ({shape.depth})")
        self.hiding = Hiding(config, shape.grid)
        self.mask_token = mask_token(self.encoder)
        self.head = nn.Linear(shape.width, shape.width)
        nn.init.trunc_normal_(self.head.weight, std=STD, a=-STD, b=STD)
        nn.init.zeros_(self.head.bias)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """The mode of all but the teacher, in which nothing is ever dropped."""
        super().train(mode)
        self.teacher.eval()
        return self

    def results(self) -> dict[str, nn.Module]:
        return {"encoder": self.teacher if self.config.result == "teacher" else self.encoder}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        pairs = zip(self.teacher.parameters(), self.encoder.parameters(), strict=True)
        own, students = zip(*((own_part(mine), own_part(student)) for mine, student in pairs), strict=True)
        torch._foreach_lerp_(own, students, 1 - self.config.momentum_at(progress))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.hiding.draw(len(batch), batch.images.device))

    @torch.no_grad()
    def truth(self, images: Tensor) -> Tensor:
        """What the teacher makes of each patch of whole images, float32 at least: (b, n, d)."""
        depth = self.encoder.config.depth
        layers = self.teacher.encode(
            self.teacher.embed(images), layers=range(depth - self.config.top, depth), grid=self.teacher.grid(images)
        )
        normed = [_normed(self.teacher.patches(tokens)) for tokens in layers]
        return _normed(torch.stack(normed).mean(0))

    def predict(self, images: Tensor, hidden: Tensor) -> Tensor:
        """The head's outputs at the hidden patches (b, k), float32 at least: (b, k, d)."""
        tokens = embed_without(self.encoder, images, hidden, self.mask_token)
        return precise(self.head(self.encoder.encode(tokens, at=hidden)))

    def compute(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for given hidden patches (b, k)."""
        truth = take(self.truth(images), hidden)  # (b, k, d)
        predicted = self.predict(images, hidden)
        mean = truth.mean((0, 1)).expand_as(truth)
        metrics = {"mean": F.smooth_l1_loss(mean, truth, beta=self.config.beta)}
        if len(images) > 1:  # a single one differs from no other
            metrics |= {
                "spread": self._spread(truth, hidden),
                "predicted": self._spread(predicted.detach(), hidden),
            }
        return F.smooth_l1_loss(predicted, truth, beta=self.config.beta), metrics

    def _spread(self, values: Tensor, places: Tensor) -> Tensor:
        """How far values (b, k, d) of patches (b, k) differ between the images of a batch, places told apart: the
        deviation from the mean of their place. It is 0 of a teacher that says but where a patch is."""
        rows, places = values.flatten(0, 1), places.flatten()
        counts = rows.new_zeros(self.hiding.patches).index_add(0, places, rows.new_ones(len(rows)))  # (n,)
        sums = rows.new_zeros(self.hiding.patches, rows.shape[1]).index_add(0, places, rows)  # (n, d)
        apart = rows - (sums / counts.clamp(min=1).unsqueeze(1))[places]
        degrees = (len(rows) - (counts > 0).sum()).clamp(min=1)
        return (apart.square().mean(1).sum() / degrees).sqrt()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of what the student is given, of its predictions, and of the teacher's targets."""
        images, patch = batch.images, self.encoder.config.patch
        hidden = self.hiding.draw(len(batch), images.device)
        truth, predicted = self.truth(images), self.predict(images, hidden)
        basis = _basis(truth.flatten(0, 1))
        return rows(images, patch, hidden, _painted(predicted, basis, patch), _painted(truth, basis, patch))


def _normed(tokens: Tensor) -> Tensor:
    """Tokens (..., d) less their mean and divided by their deviation, in float32 at least."""
    return F.layer_norm(precise(tokens), tokens.shape[-1:], eps=EPS)


def _basis(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (d,) of rows (n, d), their first three principal components (d, 3), and the deviation along each (3,).

    A component's largest entry is positive, so that pictures of one step and the next have like colours.
    """
    mean = rows.mean(0)
    variances, vectors = torch.linalg.eigh(torch.atleast_2d((rows - mean).T.cov()))
    vectors = vectors[:, -3:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, 3)
    return mean, vectors * largest.sign(), variances[-3:].flip(0).clamp(min=0).sqrt()


def _painted(values: Tensor, basis: tuple[Tensor, Tensor, Tensor], patch: int) -> Tensor:
    """Values (b, k, d) as colours that fill their patches: uint8 (b, k, p * p * 3)."""
    mean, vectors, deviations = basis
    shares = (values - mean) @ vectors / (DEVIATIONS * deviations.clamp(min=EPS))  # -1 to 1, most of them
    colours = (127.5 + 127.5 * shares).round().clamp(0, 255).to(torch.uint8)  # (b, k, 3)
    return colours.repeat(1, 1, patch * patch)
