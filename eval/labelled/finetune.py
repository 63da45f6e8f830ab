"""Training with labels, and what came of it on a split that was not trained on."""

from pathlib import Path

from mpp.data.subset import contents
from mpp.errors import UserError
from mpp.execution import Once, at_once
from mpp.files import sealed, write_atomically
from mpp.launch import launched, told_once
from mpp.recipe import Recipe
from mpp.run import run
from mpp.shards.index import read_index
from mpp.weights import load_classifier

from .predict import score_split
from .scores import Scores


class FinetuneError(UserError):
    """A recipe that does not train with labels."""


def finetune(recipe: Recipe, once: Once = at_once) -> tuple[Path, Scores | None]:
    """Carries out a recipe with labels and scores its last weights on `data.val`, if it has one.

    Leaves scores.json in the run folder. Without `recipe.weights` this is training from scratch. once: as in `run`.
    """
    objective = recipe.objective
    if not (objective.needs.labels and "classifier" in objective.results):
        with told_once():
            raise FinetuneError(
                f"{recipe.name}: objective.name is {objective.name}, expected labels, or another that trains a "
                "classifier; `mpp pretrain` is for recipes without labels"
            )
    out = run(recipe, once)
    if recipe.data.val is None or not launched().leads:
        return out, None
    classifier = load_classifier(out)
    scores = score_split(classifier, recipe.data.path, recipe.data.val)
    images = contents(read_index(recipe.data.path, recipe.data.val, recipe.data.allow))
    facts = {"classes": classifier.classes, "images": images, **scores.to_json()}
    write_atomically(out / "scores.json", sealed(facts, indent=None))
    return out, scores
