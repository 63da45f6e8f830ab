"""MAE's decoder, which a file of weights may hold beside its encoder: for pretraining that goes on from there.

Its tensors have names of their own in MAE's code (models_mae.py) and in transformers' (modeling_vit_mae.py). Its heads,
which no tensor tells, are the recipe's where no settings stand beside.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from mpp.errors import cause, shown
from mpp.models.decoder import Decoder
from mpp.models.encoder import in_yaml
from mpp.models.position_tables import sincos2d_mae
from mpp.models.trunk_config import Grid, TrunkConfig
from mpp.weights.files import Source, WeightsError
from mpp.weights.format import MISFITS, DecoderNames, Part, found_in, refuse_not_finite, row, same, shape_of

SHOWN = 6  # names of tensors in an error
NEAR = 1e-3  # what a table of positions may have lost, saved in float16, and still be MAE's
USUAL = ("norm", "swiglu", "qkv_bias", "bias", "qk_norm", "layer_scale", "pre_norm", "mixer", "gelu")  # as ViT has it


@dataclass(frozen=True)
class DecoderFile:
    """A decoder in a file, which is looked at when it is asked for."""

    source: Source
    names: DecoderNames
    grid: Grid  # of the file's encoder
    place: str  # for messages: the file and its format

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors that are the decoder's; none where it holds none."""
        names, tensors = self.names, self.source.tensors
        found = {name: tensors[name] for name in tensors if name.startswith((names.start, names.blocks))}
        has_blocks = any(name.startswith(names.blocks) for name in found)
        return found | {name: tensors[name] for name in (names.mask_token,) if name in tensors} if has_blocks else {}

    @torch.no_grad()
    def fill(self, decoder: Decoder) -> None:
        """Gives a decoder these weights; WeightsError, one line, where it is another one."""
        try:
            told, parts = self._read()
        except MISFITS as error:
            raise WeightsError(f"{self.place}: its decoder: {shown(cause(error))}") from error
        here = decoder.trunk.config
        own: dict[str, Any] = {name: getattr(here, name) for name in told}
        own |= {"mlp": here.hidden, "mixer": tuple(dict.fromkeys(here.mixers))}  # however they are given
        if here.positions == "learned":  # a table that holds any
            own["positions"] = told["positions"]
        if other := {name: there for name, there in told.items() if there != own[name]}:
            wrong = "; ".join(f"{here.section}.{name} {there} there, {own[name]} here" for name, there in other.items())
            alike = " ".join(f"{here.section}.{name}={in_yaml(there)}" for name, there in other.items())
            raise WeightsError(
                f"{self.place}: another decoder than the recipe's: {wrong}; to have it as there: {alike}"
            )
        found, misfits = found_in(self.source.tensors, parts, decoder.state_dict())
        used = {name for part in parts.values() for name in part.names}
        misfits += [f"{name} unexpected" for name in self.tensors if name not in used]
        if misfits:
            more = f" and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
            raise WeightsError(f"{self.place}: its decoder: {'; '.join(map(shown, misfits[:SHOWN]))}{more}")
        refuse_not_finite(self.place, found, parts, self.source)
        decoder.load_state_dict(found)

    def _read(self) -> tuple[dict[str, Any], dict[str, Part]]:
        """What the file tells of the decoder's settings, and where each of our tensors is."""
        start, blocks = self.names.start, self.names.blocks
        numbers = {name.removeprefix(blocks).partition(".")[0] for name in self.tensors if name.startswith(blocks)}
        depth = 1 + max(int(number) for number in numbers)
        table = f"{start}pos_embed"
        parts = {
            "mask_token": row(self.names.mask_token),
            "trunk.positions.table": Part((table,), lambda rows: rows[0, 1:], _unwritten),
        }
        for ours, theirs in {"narrow": "embed", "trunk.norm": "norm", "head": "pred"}.items():
            parts |= {f"{ours}.{kind}": same(f"{start}{theirs}.{kind}") for kind in ("weight", "bias")}
        for number in range(depth):
            parts |= self.names.block(f"trunk.blocks.{number}.", f"{blocks}{number}.")
        width = shape_of(self.source, f"{start}embed.weight", 2)[0]
        told = {
            "width": width,
            "depth": depth,
            "mlp": shape_of(self.source, parts["trunk.blocks.0.mlp.expand.weight"].names[0], 2)[0],
            "positions": self._positions(table, width),
            **{name: getattr(TrunkConfig(), name) for name in USUAL},
        }
        return told | dict(self.names.told), parts

    def _positions(self, name: str, width: int) -> str:
        """Which of our positions a table (1, 1 + n, width) holds; its first row is the class token's."""
        shape_of(self.source, name, 3)
        rows = self.source.tensors[name][0].float()
        if width % 4 == 0:
            fixed = torch.cat([torch.zeros(1, width), sincos2d_mae(self.grid, width).float()])
            if rows.shape == fixed.shape and torch.allclose(rows, fixed, rtol=0, atol=NEAR):
                return "sincos2d_mae"
        if rows[:1].any():
            raise ValueError(f"{name} has a position for the class token, which a decoder of mpp has not")
        return "learned" if rows.any() else "none"


def _unwritten(ours: Tensor) -> NoReturn:
    raise NotImplementedError("no decoder is written")
