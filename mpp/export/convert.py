"""`mpp convert`: weights that mpp loads, written as other libraries take them and read back, with a model card."""

import io
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mpp import budget, jsons
from mpp.augment.input import Input
from mpp.errors import UserError, cause, counted, shown
from mpp.export import onnx
from mpp.export.card import WRITERS, card, facts_needed
from mpp.export.origin import Given
from mpp.files import FileError, claimed, sync, write_atomically
from mpp.models.classifier import Classifier
from mpp.models.encoder import Encoder
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.recipe.build import made
from mpp.recipe.check import check as check_values
from mpp.recipe.check import hints_of
from mpp.recipe.files import settings_of
from mpp.recipe.text import NO_YAML
from mpp.weights import CLASSIFIER, ENCODER, files, foreign, huggingface, load_classifier, load_encoder, own

CHOICES = (*WRITERS, "safetensors", "export", "onnx")
EXPORTED = "model.pt2"
CLOSE = 1e-5  # of the largest magnitude: what one forward pass may differ by, tensors being equal bit for bit
ASIDE = 6  # names of tensors on the command line


class ConvertError(UserError):
    """Weights that can't be written as asked, or did not come back as they were written."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    to: str
    what: str  # was converted, in words
    files: tuple[str, ...]
    tensors: int  # in the files, compared bit for bit with the model's
    difference: float  # of one forward pass's outputs from the model's, as a share of their largest magnitude
    aside: tuple[str, ...]  # tensors of the given file that are no part of the model

    def __str__(self) -> str:
        same = "numbers equal" if self.difference == 0 else f"numbers within {self.difference:.0e}"
        lines = [f"{shown(self.folder)}: {', '.join(self.files)}"]
        lines += [f"{self.to}: {self.what}; {counted(self.tensors, 'tensor')}, read back: each bit equal, {same}"]
        if self.aside:
            more = ", ..." if len(self.aside) > ASIDE else ""
            names = ", ".join(map(shown, self.aside[:ASIDE]))
            lines.append(f"left aside, as no part of it: {len(self.aside)} of the file's parts ({names}{more})")
        return "\n".join(lines)


def convert(weights: str | Path, out: str | Path, to: str, *, head: bool = True, **facts: Any) -> Converted:
    """Writes weights as a new folder `out` that another library loads, with a README.md, the model card.

    weights, facts: as `mpp.load_encoder` takes them; a classifier is written with its head unless `head` is False.
    to: timm, huggingface, google (.npz), safetensors (mpp's own), export (`torch.export`) or onnx (the extra `onnx`):
        of these two, uint8 images of the encoder's size go in, any number at once, and logits or vectors come out.

    The folder is there as a whole or not at all. What was written is read back first: all tensors must be equal bit for
    bit. Raises a UserError, one line, if the folder is not empty, or the format has no place for the model.
    """
    if to not in CHOICES:
        near = get_close_matches(to.lower(), CHOICES)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(CHOICES)}"
        raise ConvertError(f"--to {shown(to)}: no format; {hint}")
    if to == "onnx":
        onnx.check_packages()
    target = Path(out).resolve()
    if target == Path.cwd():  # it is replaced, and a shell would be left in the old one
        raise ConvertError(f"{shown(out)}: is the working directory; choose a new folder")
    partial = target.with_name(f".{target.name}.partial")
    with claimed(target, "another `mpp convert` is writing there"):
        if any(path.name != ".lock" for path in target.iterdir()):
            raise ConvertError(f"{shown(out)}: not empty; choose a new folder")
        given = load(Path(weights), head, facts)
        if not _any_size(given.encoder, to) and given.encoder.input.image != given.encoder.config.image:
            given = replace(given, encoder=given.encoder.resized(given.encoder.input.image))  # as it is used, so exact
        shutil.rmtree(partial, ignore_errors=True)  # what a killed conversion left
        try:
            partial.mkdir()
            write(given, partial, to)
            tensors, difference = check(given, partial, to)
            write_atomically(partial / "README.md", card(given, to).encode())
            (target / ".lock").unlink()  # a folder that is replaced must be empty
            os.rename(partial, target)
            sync(target.parent)
        except OSError as error:
            raise FileError(f"{shown(out)}: cannot be written: {cause(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    names = tuple(sorted(path.name for path in target.iterdir()))
    return Converted(Path(out), to, given.describe(), names, tensors, difference, given.aside)


def facts_of(settings: Sequence[str]) -> dict[str, Any]:
    """`heads=2`, `image=[96,128]` and the like, fields of ViTConfig in YAML, as keywords for `convert`."""
    for setting in settings:
        if not all(part.strip() for part in setting.partition("=")):
            raise ConvertError(f"command line: expected KEY=VALUE, found {shown(setting)}")
    try:
        values = settings_of(settings)
    except NO_YAML as error:
        raise ConvertError(f"command line: {shown(cause(error))}") from error
    for key, value in values.items():
        if "${" in str(value):
            raise ConvertError(f"command line: {shown(key)}: expected a plain value, found {shown(value)}")
    place = {foreign.PREFIX: str(values.pop(foreign.PREFIX))} if values.get(foreign.PREFIX) is not None else {}
    if type(values.get("image")) is int:
        values["image"] = [values["image"], values["image"]]
    if type(values.get("mixer")) is str:
        values["mixer"] = [values["mixer"]]
    hints = hints_of(Input) | hints_of(ViTConfig)
    check_values(values, hints, "command line")
    return {key: made(hints[key], value) for key, value in values.items()} | place


def load(path: Path, head: bool, facts: dict[str, Any]) -> Given:
    """What a path holds, as `mpp.load_classifier` and `mpp.load_encoder` take it: with its head where it has one."""
    if file := own.find(path, *CLASSIFIER, *ENCODER):
        if head and _names_classes(file):
            classifier = load_classifier(file, **facts)
            return Given(path, file, "mpp", classifier.encoder, classifier.head, classifier.classes)
        return Given(path, file, "mpp", load_encoder(file, **facts))
    found = foreign.read(path, facts)
    encoder, aside, kept = found.encoder.eval(), found.aside, None
    classes: tuple[str, ...] = ()
    if head and found.head is not None:
        kept, classes = found.head.eval(), found.classes
    return Given(path, path, found.format, encoder, kept, classes, aside)


def _any_size(encoder: Encoder, to: str) -> bool:
    """Whether what reads a format back feeds it images of another size than its positions are for."""
    dinov2 = isinstance(encoder, ViT) and huggingface.family_of(encoder.config) != "vit"
    return to == "safetensors" or (to == "huggingface" and dinov2)


def _names_classes(file: Path) -> bool:
    """Whether a file of ours holds a classifier: its metadata, JSON, has a key that no encoder's config has."""
    try:
        budget.check_safetensors(file)
        with safe_open(file, "pt") as opened:
            return '"classes":' in (opened.metadata() or {}).get("encoder", "")
    except (OSError, SafetensorError, budget.Overrun):
        return False  # loading it says what is wrong


def write(given: Given, folder: Path, to: str) -> None:
    """Writes the format's files; ConvertError says what it has no place for."""
    if to == "safetensors" and isinstance(given.model, Classifier):
        own.save_classifier(given.model, folder / CLASSIFIER[0])
    elif to == "safetensors":
        own.save_encoder(given.encoder, folder / ENCODER[0])
    elif to == "export":
        write_atomically(folder / EXPORTED, exported(given.model, given.encoder))
    elif to == "onnx":
        onnx.write(given, _pictures(given.encoder, 2), folder)
    else:
        if not isinstance(given.encoder, ViT):
            kind = given.encoder.config.name
            raise ConvertError(f"{shown(given.path)}: {to}: model.name {kind} has no place there, expected vit")
        if given.encoder.config.causal:
            raise ConvertError(f"{shown(given.path)}: {to}: model.causal has no place there; export and onnx keep it")
        try:
            contents = WRITERS[to].write(given.encoder, given.head, given.classes)
        except ValueError as error:
            raise ConvertError(f"{shown(given.path)}: {to}: {error}") from error
        for name, content in contents.items():
            write_atomically(folder / name, content)


def exported(model: nn.Module, encoder: Encoder) -> bytes:
    """A model as torch.export writes it: for uint8 images (b, c, h, w) of the encoder's size, and any b."""
    images = _pictures(encoder, 2)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fixed tables that share memory; what was written is compared
        # Without `strict`, len() of a tensor would fix the batch to the example's.
        batch = {"images": {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(model, (images,), dynamic_shapes=batch, strict=True)
        fed = jsons.text(asdict(encoder.input))  # what is to be done to pictures; README.md says it in Python
        torch.export.save(program, file, extra_files={"input.json": fed})
    return file.getvalue()


def check(given: Given, folder: Path, to: str) -> tuple[int, float]:
    """Reads a folder back: the number of its tensors, and how far one forward pass's numbers are from the model's.

    Raises ConvertError if any tensor differs in any bit, or a number by more than CLOSE.
    """
    if to == "export":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch 2.11's about its own buffers
            program = torch.export.load(folder / EXPORTED)
        count = _compare(given.model.state_dict(), dict(program.state_dict), to)
        return count, _difference(given, program.module(), to)
    if to == "onnx":
        count = _compare(*onnx.pairs(given, folder), to)
        return count, _difference(given, onnx.Session(folder), to, onnx.BATCHES, onnx.CLOSE)
    if to == "safetensors":
        back = load(folder, given.head is not None, {})
        count = _compare(given.model.state_dict(), back.model.state_dict(), to)
        return count, _difference(given, back.model, to)
    facts = facts_needed(to, given.encoder)
    source = files.read(folder / "model.npz" if to == "google" else folder)
    found = foreign.load(source, facts)
    again = Given(folder, folder, to, found.encoder.eval(), found.head, found.classes)
    _compare(_placed(given), _placed(again), to)
    if to != "google" and given.classes != again.classes:  # Google's has no names
        raise ConvertError(f"{to}: the names of the classes did not come back as written: please report this")
    return len(source.tensors), _difference(given, again.model, to)


def _placed(given: Given) -> dict[str, Tensor]:
    """A model's tensors, with what positions add to the tokens, by table or by formula, in place of how it is kept."""
    encoder = given.encoder
    assert isinstance(encoder, ViT), "no other is written so that it has to be read in another library's format"
    found = {name: value for name, value in given.model.state_dict().items() if ".positions." not in f".{name}"}
    patches = encoder.positions.patches(encoder.config.grid).detach()
    found["positions"] = patches.expand(encoder.tokens - encoder.prefix, -1)
    if encoder.config.has_class_token:
        found["position of the class token"] = encoder.positions.class_token().detach()
    return found


def _compare(given: dict[str, Tensor], back: dict[str, Tensor], to: str) -> int:
    """The number of tensors, if all are equal."""
    wrong = sorted(given.keys() ^ back.keys())
    wrong += [name for name in given.keys() & back.keys() if not _equal(given[name], back[name])]
    if wrong:
        raise ConvertError(f"{to}: {', '.join(wrong[:ASIDE])} did not come back as written: please report this")
    return len(given)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def _difference(given: Given, back: nn.Module, to: str, counts: Sequence[int] = (1, 3), close: float = CLOSE) -> float:
    worst = 0.0
    for count in counts:
        images = _pictures(given.encoder, count)
        expected, found = given.model(images), back(images)
        if torch.equal(expected, found):
            continue
        # Very large weights give outputs that are no numbers; where one has a number the other must have one.
        known = expected.isfinite()
        if expected.shape != found.shape or not torch.equal(known, found.isfinite()):
            raise ConvertError(f"{to}: the outputs of what was written are not the model's: please report this")
        if known.any():
            largest = max(expected[known].abs().max().item(), torch.finfo(expected.dtype).tiny)
            worst = max(worst, (expected - found)[known].abs().max().item() / largest)
    if worst > close:
        raise ConvertError(f"{to}: outputs differ by {worst:.0e} from the model's: please report this")
    return worst


def _pictures(encoder: Encoder, count: int) -> Tensor:
    """Noise, always the same, uint8 (count, c, h, w)."""
    config, generator = encoder.config, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, config.channels, *config.image), generator=generator, dtype=torch.uint8)
