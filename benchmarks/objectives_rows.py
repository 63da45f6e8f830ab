"""What `benchmarks.objectives` pretrains."""

from dataclasses import dataclass

SHAPE = ("model.positions=sincos2d", "train.threads=1")
DROPPED = "cifar10/mpp_dropped"


@dataclass(frozen=True)
class Row:
    """One line of a table: what is pretrained."""

    title: str
    recipe: str
    settings: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()  # settings of fine-tuning as well


ROWS = {
    "mpp": Row("Masked patches, full form, mean colour", "cifar10/mpp"),
    "mpp_dropped": Row("Masked patches, dropped form, mean colour", DROPPED),
    "mae": Row("MAE", "cifar10/mae"),
    "simmim": Row("SimMIM", "cifar10/simmim"),
    "maskfeat": Row("MaskFeat", "cifar10/maskfeat"),
    "data2vec": Row("data2vec", "cifar10/data2vec"),
    "igpt": Row("Autoregressive, colours (iGPT)", "cifar10/igpt", encoder=("model.causal=true",)),
    "aim": Row("Autoregressive, pixels (AIM)", "cifar10/aim"),
}
FORMS = ("mpp", "mpp_dropped", "mae")
VARIANTS = {
    f"mpp_dropped-{share}-{depth}": Row(
        f"share {share:g}, decoder of {depth}",
        DROPPED,
        (f"objective.share={share}", f"objective.decoder.depth={depth}"),
    )
    for share in (0.5, 0.75, 0.9)
    for depth in (1, 2)
}
