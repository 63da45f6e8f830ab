"""A run: from a recipe to a folder with metrics, checkpoints and an encoder; started again there, it goes on."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mpp.errors import counted, within_memory
from mpp.execution import Once, at_once, prepare_cuda
from mpp.files import claimed
from mpp.hardware import device_kind
from mpp.launch import told_once
from mpp.loop import train
from mpp.ranks import together
from mpp.recipe import Recipe
from mpp.run.evaluation import evaluation
from mpp.run.finished import drop_state, is_finished
from mpp.run.images import open_images
from mpp.run.onward import go_on_from, open_source, same_source
from mpp.run.start import begin, check_same_folder, check_shared_epochs, earlier, go_on, refuse_leftovers
from mpp.saving import on_host
from mpp.split import is_sharded
from mpp.weights import save_result

logger = logging.getLogger("mpp.run")

SIZES = "model.width or model.depth"
BUSY = "in use by a run that is still going; stop it, or choose another folder with out="


def run(recipe: Recipe, once: Once = at_once) -> Path:
    """Carries out a recipe to its end, or on from where it stopped; gives the run folder.

    once: makes the choices that are left to the machine, for `mpp compare` the same ones for all its runs.
    """
    out, alone = recipe.folder, once
    prepare_cuda(recipe.train)
    with told_once():
        kind = device_kind(recipe.train.device)
    with together(kind, recipe.train.timeout) as ranks, ExitStack() as stack:
        if ranks.leads:
            stack.enter_context(claimed(out, BUSY))
        ranks.wait()

        def once(what: str, choose: Callable[[], Any]) -> Any:
            return ranks.shared(lambda: alone(what, choose))

        if recipe.train.shard == "full" and ranks.size == 1:
            logger.info("%s: train.shard: full splits nothing, as this process trains by itself", out)
        before = earlier(out)
        check_same_folder(out, ranks)
        source = None
        if before is None:
            refuse_leftovers(out, recipe.objective)
        if before is not None:
            same_source(before, recipe)
        elif recipe.continues is not None:
            source = open_source(recipe.continues)
        with within_memory(f"{out}: opening the images", "lower data.memory, or set data.reader=indexed"):
            images = open_images(source.chosen(recipe) if source else recipe, before and before.settled, once)
        stack.callback(images.close)
        with within_memory(f"{out}: building {recipe.model.describe()}", f"lower {SIZES}"):
            if before is not None:
                objective, settled = go_on(before, recipe, images)
            elif source is not None:
                objective, settled = go_on_from(source, recipe, images, once)
            else:
                objective, settled = begin(recipe, images, once)
        if is_finished(out):
            return out
        check_shared_epochs(recipe, images.batches.epoch, ranks)
        settings, micro = settled.fill(recipe), settled.execution.micro_batch
        doing = f"{out}: training {recipe.model.describe()} with {counted(micro, 'image')} at a time"
        with within_memory(doing, f"lower train.micro_batch (it is {micro}), model.image, {SIZES}"):
            train(
                objective,
                images.batches,
                settings.train,
                out=out,
                seed=recipe.seed,
                log=recipe.log,
                execution=settled.execution,
                evaluate=evaluation(settings, objective, images, settled.execution),
                evaluate_every=recipe.eval.every,
            )
            for name, result in objective.results().items() if ranks.leads or is_sharded(objective) else ():
                whole = on_host({name: result.state_dict()}, ranks.leads)
                if ranks.leads:
                    save_result(result, out / f"{name}.safetensors", whole[name])
        if ranks.leads and not recipe.train.keep_state:
            drop_state(out, [f"{name}.safetensors" for name in objective.results()])
    return out
