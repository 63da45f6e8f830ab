"""Which tensors of a file are the encoder's, where trainers put their own names in front: `module.`, `model.`, `ema.`.

There is no list of such names. Every format has a tensor that each of its files holds, and what stands in front of that
one is the prefix. Two prefixes are two models, of which one is taken by RANKS or refused to choose from.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from mpp.errors import shown

# A tensor of each format that torch and safetensors files hold, the stem's weight where that has a name of its own,
# and what the format itself may put in front of it, beside which its heads stand.
ANCHORS: dict[str, tuple[str, ...]] = {
    "patch_embed.proj.weight": (),  # timm, MAE, DINO
    "patch_embed.weight": (),  # CAPI
    "embeddings.patch_embeddings.projection.weight": ("vit.", "dinov2.", "dinov2_with_registers."),  # transformers
    "embeddings.patch_embedding.weight": ("vision_model.",),  # transformers' CLIP
    "ln_post.weight": ("visual.",),  # OpenAI's and open_clip's
}
# Words of a prefix that tell which of several models others use: DINO's teacher and running averages are published
# (timm's load_checkpoint too takes the average), of MoCo, BYOL and I-JEPA the other one of a pair.
FIRST = {"ema", "teacher", "averaged", "swa"}
LAST = {"student", "momentum", "predictor", "decoder"}
WHOLE = {"target_encoder": 0, "encoder_k": 2}  # I-JEPA's evaluations; MoCo's keys
HEADS_BESIDE = "linear_head."  # of DINOv2's classifiers, beside their `backbone.`


@dataclass(frozen=True)
class Choice:
    """The prefix whose tensors are read, and what of the file looks like a model too."""

    prefix: str
    others: tuple[str, ...] = ()
    picked: bool = False  # by RANKS, which has to be said


class Ambiguous(ValueError):
    """Several models fit, or none is where the user says; one line that says which there are."""


def candidates(names: Iterable[str]) -> list[str]:
    """Everything that stands in front of a format's anchor, '' where it has none, in the order of the names."""
    found: dict[str, None] = {}
    for name in names:
        for anchor, inner in ANCHORS.items():
            if f".{name}".endswith(f".{anchor}"):
                prefix = name.removesuffix(anchor)
                own = next((own for own in inner if f".{prefix}".endswith(f".{own}")), "")
                found[prefix.removesuffix(own)] = None
    return list(found)


def rank(prefix: str) -> int:
    """0 of what others use where there are two, 2 of what they leave, 1 of any other."""
    parts = prefix.split(".")
    words = {word for part in parts for word in part.split("_")}
    whole = [WHOLE[part] for part in parts if part in WHOLE]
    return whole[0] if whole else 0 if words & FIRST else 2 if words & LAST else 1


def choose(names: Collection[str], wanted: str | None, same: Callable[[str, str], bool]) -> Choice | None:
    """The prefix to read, or None where no format's anchor is among the names.

    wanted: what the user says the names begin with, or have between dots where none begins so; '.' for those that
        nothing stands in front of.
    same: whether all tensors behind the first prefix are behind the second one too, by name and value.
    """
    found = candidates(names)
    if wanted is None:
        fitting = found
    else:
        asked = "" if wanted == "." else wanted.removesuffix(".") + "."
        if any(name.startswith(asked) for name in names):
            fitting = [asked] if asked in found or wanted == "." else [name for name in found if name.startswith(asked)]
        elif not (fitting := [name for name in found if f".{asked}" in f".{name}"]):  # within: state_dict.student.
            there = ", ".join(map(_word, found)) or "none that fits"
            raise Ambiguous(f"prefix={shown(wanted)}: no tensor's name begins so; models in the file: {there}")
        if not fitting:
            return Choice(asked, tuple(found))
    if not fitting:
        return None
    best = [prefix for prefix in fitting if rank(prefix) == min(map(rank, fitting))]
    picked = len(best) < len(fitting)
    while len(best) > 1:  # the same model under two names, as modules that share a part are saved
        twin = next((one for one in best for other in best if one != other and same(one, other)), None)
        if twin is None:
            say = f"prefix={_word(best[0])}"  # any of them
            way = f"{say} (on the command line, first `mpp convert WEIGHTS OUT --to safetensors {say}`)"
            raise Ambiguous(f"holds several models: {', '.join(map(_word, best))}; say which: {way}")
        best.remove(twin)
    return Choice(best[0], tuple(prefix for prefix in found if prefix != best[0]), picked)


def _word(prefix: str) -> str:
    return shown(prefix or ".")
