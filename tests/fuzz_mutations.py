"""Ways to spoil a file, blindly and by what its bytes mean; each gives other bytes from a Random and some bytes.

What is built of parts (zip, tar, PNG, safetensors) is put together anew with right checksums and lengths, so that what
was changed inside is looked at.
"""

import io
import json
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

LONGEST = 2**16  # bytes that are put in at a time
WHOLE = (
    0,
    1,
    -1,
    2,
    127,
    255,
    256,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
)
ODD_TEXTS = (
    "", " ", "\0", "\n", "\u202e", "\x1b[31m", "../x", "/etc/passwd", "a" * 5000, "${x}", "???", "é", "\ud800", "=1+1",
    "nan", "-1", "1e999", "__class__", "http://127.0.0.1:9/x", "file:///etc/passwd", "pipe:touch x", "null", "vit",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31 - 1, 2**63, 2**64, 10**400, -0.5, 1e308, float("inf"), float("nan"), [], {},
    [[]], [0], [2**64], {"a": 1}, [None], ["x"], *ODD_TEXTS,
)  # fmt: skip


# Blindly


def flipped(random: Random, data: bytes) -> bytes:
    spoilt = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        if spoilt:
            spoilt[random.randrange(len(spoilt))] ^= 1 << random.randrange(8)
    return bytes(spoilt)


def cut(random: Random, data: bytes) -> bytes:
    start, end = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    return random.choice((data[:end], data[:start] + data[end:], data[start:]))


def repeated(random: Random, data: bytes) -> bytes:
    start = random.randrange(len(data) + 1)
    piece = data[start : start + random.choice((1, 2, 8, 64, 512))]
    times = random.choice((1, 2, 16, LONGEST // max(1, len(piece))))
    return data[:start] + piece * times + data[start:]


def number(random: Random, data: bytes) -> bytes:
    """Writes an unusual whole number somewhere, in two, four or eight bytes of either order."""
    spoilt, width = bytearray(data), random.choice((1, 2, 4, 8))
    place = random.randrange(max(1, len(data) - width + 1))
    value = random.choice(WHOLE) % (1 << 8 * width)
    spoilt[place : place + width] = value.to_bytes(width, random.choice(("little", "big")))
    return bytes(spoilt)


def digits(random: Random, data: bytes) -> bytes:
    """Puts another number in the place of one that stands there as text."""
    found = list(re.finditer(rb"[0-9]+", data[:LONGEST]))
    if not found:
        return number(random, data)
    place = random.choice(found)
    return data[: place.start()] + str(random.choice(WHOLE)).encode() + data[place.end() :]


BLIND: tuple[Mutation, ...] = (flipped, flipped, cut, repeated, number, digits)


def several(random: Random, data: bytes, ways: tuple[Mutation, ...]) -> bytes:
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice(ways)(random, data)
    return data


# JSON


def json_text(random: Random, data: bytes) -> bytes:
    """Changes a value or key at some place of a JSON, also inside of texts that are JSON themselves."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return several(random, data, BLIND)
    return json.dumps(_changed(random, tree)).encode()


def _changed(random: Random, tree: Any) -> Any:
    if isinstance(tree, str) and tree[:1] in ("{", "[") and random.random() < 0.9:
        with suppress(ValueError, RecursionError):
            return json.dumps(_changed(random, json.loads(tree)))
    if isinstance(tree, dict | list) and tree and random.random() < 0.9:
        tree = tree.copy()
        key = random.choice(list(tree)) if isinstance(tree, dict) else random.randrange(len(tree))
        deed = random.random()
        if deed < 0.1:
            del tree[key]
        elif deed < 0.2 and isinstance(tree, dict):
            tree[random.choice(ODD_TEXTS)] = tree.pop(key)
        elif deed < 0.2:
            tree *= random.choice((0, 2, 100))
        else:
            tree[key] = _changed(random, tree[key])
        return tree
    if random.random() < 0.05:
        for _ in range(random.choice((30, 100, 500))):
            tree = [tree] if random.random() < 0.5 else {"a": tree}
    return tree if isinstance(tree, list) and random.random() < 0.1 else random.choice(ODD_VALUES)


def json_lines(random: Random, data: bytes) -> bytes:
    rows = data.split(b"\n")
    place = random.randrange(len(rows))
    rows[place] = random.choice((json_text, flipped, cut))(random, rows[place] or b"{}")
    return b"\n".join(rows)


# YAML


YAML_PIECES = (
    "!!python/object/apply:os.system [touch x]", "&a [*a, *a]", "*a", "[" * 200, "{a: " * 100, "? {}", "- ",
    "!!binary x",
    "!!bool a", "!!timestamp 9999-99-99", "<<: {}", "${oc.env:HOME}", "1_000", "0o17", "1e999", ".nan", "2**64", "null",
    "'", '"\\x00"', "---", "...", "%YAML 9.9", "\t", "base: ../../../etc/passwd", "#", "|\n  x", str(10**400), "~",
)  # fmt: skip


def yaml_text(random: Random, data: bytes) -> bytes:
    rows = data.decode("utf-8", "replace").split("\n")
    place, other = random.randrange(len(rows)), random.randrange(len(rows))
    deed = random.randrange(6)
    if deed == 0:
        del rows[place]
    elif deed == 1:
        rows.insert(place, rows[other])
    elif deed == 2:
        rows[place] = " " * random.randrange(5) + rows[place]
    elif deed == 3:
        rows.insert(place, random.choice(YAML_PIECES))
    else:
        key = rows[place].partition(":")[0]
        value = random.choice((*YAML_PIECES, *map(json.dumps, ODD_VALUES)))
        rows[place] = f"{key}: {value}"
    return "\n".join(rows).encode("utf-8", "surrogatepass")


# Pickles


def pickled(random: Random, data: bytes) -> bytes:
    """Deletes, repeats, moves or changes opcodes of a pickle, or of pickles one behind the other."""
    pieces, stream = [], io.BytesIO(data)
    with suppress(Exception):
        while True:
            ops = [(code, place) for code, _, place in pickletools.genops(stream)]
            ends = [place for _, place in ops[1:]] + [stream.tell()]
            pieces += [data[start:end] for (_, start), end in zip(ops, ends, strict=True)]
    if len(pieces) < 2:
        return several(random, data, BLIND)
    rest = data[sum(map(len, pieces)) :]
    for _ in range(random.choice((1, 1, 2, 5))):
        place, other = random.randrange(len(pieces)), random.randrange(len(pieces))
        deed = random.randrange(6)
        if deed == 0:
            pieces[place] = b""
        elif deed == 1:
            pieces.insert(place, pieces[other])
        elif deed == 2:
            pieces[place], pieces[other] = pieces[other], pieces[place]
        elif deed == 3:
            pieces[place] = (number if len(pieces[place]) > 1 else flipped)(random, pieces[place])
        elif deed == 4:
            pieces.insert(place, random.choice(PICKLE_PIECES))
        else:
            pieces[place] = pieces[place] * random.choice((2, 100, 1000))
    return b"".join(pieces) + rest


def _call(module: str, name: str, *arguments: int) -> bytes:
    numbers = b"".join(b"\x8a\x08" + struct.pack("<q", argument) for argument in arguments)
    return f"c{module}\n{name}\n(".encode() + numbers + b"tR"


PICKLE_PIECES = (
    b"(", b")", b"]", b"}", b"0", b"2", b"t", b"u", b"s", b"a", b"e", b"R", b"b", b"Q", b"N", b"\x85", b"\x86", b"\x81",
    b"h\0", b"q\0", b"\x8f", b"\x90", b")" + b"q\1h\1\x86" * 60, b"]" * 1000, b"\x8a\xff" + b"\x7f" * 255,
    _call("__builtin__", "bytearray", 2**40), _call("torch", "FloatTensor", 2**40), _call("torch", "Size", -1),
    _call("torch", "device", 0), _call("collections", "Counter", 5), _call("__builtin__", "set", 1),
    _call("torch.storage", "UntypedStorage", 2**36), _call("torch._utils", "_rebuild_tensor_v2", 0, 0),
    b"cos\nsystem\nX\x07\0\0\0touch x\x85R", b"cargparse\nNamespace\n)\x81}b", b"cnumpy\ndtype\nX\2\0\0\0O8\x85R",
)  # fmt: skip


# Archives


def safetensors(random: Random, data: bytes) -> bytes:
    """Changes the header's JSON and gives its right length."""
    size = int.from_bytes(data[:8], "little")
    header = json_text(random, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def npy(random: Random, data: bytes) -> bytes:
    """Changes what an array's header says, and gives its right length."""
    size = int.from_bytes(data[8:10], "little")
    if data[:6] != b"\x93NUMPY" or random.random() < 0.3:
        return several(random, data, BLIND)
    header = data[10 : 10 + size].decode("latin1")
    shape = random.choice(
        ("()", "(0,)", "(-1,)", f"({2**62},)", f"({2**62}, 4)", f"(0, {2**62})", "(1,)*9", "(1.5,)", "x")
    )
    kind = random.choice(("|O", "<f2", ">f8", "<f4", "|V2", "<M8[D]", "<c8", "|b1", "<U4", "<i8", "zz", "<f4,<i4"))
    header = random.choice((re.sub(r"\([^)]*\)", shape, header), re.sub(r"'[<>|=]\w+'", repr(kind), header)))
    text = header.encode()
    return data[:8] + len(text).to_bytes(2, "little") + text + data[10 + size :]


def zip_member(random: Random, data: bytes, ways: dict[str, tuple[Mutation, ...]]) -> bytes:
    """Changes members, by the ends of their names, and writes the archive anew; or a field of its directory."""
    if random.random() < 0.25:
        places = [found.start() for found in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", data)]
        if places:
            place, spoilt = random.choice(places) + random.randrange(4, 46), bytearray(data)
            width = random.choice((1, 2, 4))
            value = random.choice((0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, len(data))) % (1 << 8 * width)
            spoilt[place : place + width] = value.to_bytes(width, "little")
            return bytes(spoilt)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    except Exception:
        return several(random, data, BLIND)
    place = random.randrange(len(members))
    name, inside = members[place]
    fitting = next((some for end, some in ways.items() if name.endswith(end)), BLIND)
    deed = random.random()
    if deed < 0.75:
        members[place][1] = random.choice(fitting)(random, inside)
    elif deed < 0.8:
        del members[place]
    elif deed < 0.85:
        members.append([random.choice(members)[0], inside])
    elif deed < 0.9:
        members[place][0] = random.choice(ODD_TEXTS) or "x"
    else:
        members *= random.choice((2, 50))
    how = random.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
    )
    with suppress(UnicodeError, ValueError), zipfile.ZipFile(made := io.BytesIO(), "w", how) as archive:
        for name, inside in members:
            archive.writestr(name.replace("\0", "0"), inside)
        archive.close()
        return made.getvalue()
    return flipped(random, data)


def tar_member(random: Random, data: bytes, ways: dict[str, tuple[Mutation, ...]]) -> bytes:
    """Changes members or fields of their headers, with right checksums."""
    if random.random() < 0.5:
        spoilt = bytearray(data)
        place = random.randrange(max(1, len(data) // 512)) * 512
        start, width = random.choice(((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
        value = random.choice((b"\0", b"\xff", b"7", b"\x80", b"x", b"L", b"g", b"S", b"1", b"../", b"99999999999"))
        spoilt[place + start : place + start + width] = (value * width)[:width]
        spoilt[place + 148 : place + 156] = b" " * 8
        spoilt[place + 148 : place + 156] = b"%06o\0 " % sum(spoilt[place : place + 512])
        return bytes(spoilt)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = [[info.name, tar.extractfile(info).read()] for info in tar if info.isfile()]  # type: ignore[union-attr]
    except Exception:
        return several(random, data, BLIND)
    if not members:
        return several(random, data, BLIND)
    place = random.randrange(len(members))
    name, inside = members[place]
    if random.random() < 0.7:
        members[place][1] = random.choice(next((some for end, some in ways.items() if name.endswith(end)), BLIND))(
            random, inside
        )
    else:
        members[place][0] = random.choice(
            (*ODD_TEXTS, random.choice(members)[0], "a/" * 2000 + "x.png", "b.PNG", ".png")
        )
    form = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with suppress(ValueError, UnicodeError), tarfile.open(fileobj=(made := io.BytesIO()), mode="w", format=form) as tar:
        for name, inside in members:
            info = tarfile.TarInfo(name.replace("\0", "0"))
            info.size = len(inside)
            tar.addfile(info, io.BytesIO(inside))
        tar.close()
        return made.getvalue()
    return flipped(random, data)


# Images


def png(random: Random, data: bytes) -> bytes:
    """Changes, repeats, moves or puts in chunks, with right checksums."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    if not chunks:
        return several(random, data, BLIND)
    at, deed = random.randrange(len(chunks)), random.randrange(4)
    kind, inside = chunks[at]
    if deed == 0:
        chunks[at] = kind, several(random, inside, BLIND)
    elif deed == 1:
        chunks.insert(at, random.choice(chunks))
    elif deed == 2:
        packed = b"k\0\0" + zlib.compress(bytes(2**20))
        some = ((b"zTXt", packed), (b"iCCP", packed), (b"tEXt", b"a" * 5000), (b"eXIf", b"II*\0" + b"\xff" * 60))
        more = (
            (b"tRNS", b"\0" * 300),
            (b"PLTE", b"\1" * 9),
            (b"acTL", b"\xff" * 8),
            (b"fcTL", b"\x7f" * 26),
            (b"gAMA", b""),
        )
        chunks.insert(at, random.choice((*some, *more)))
    else:
        head = bytearray(chunks[0][1].ljust(13, b"\0"))
        width = random.choice((4, 4, 1))
        start = random.choice((0, 4)) if width == 4 else random.randrange(8, 13)
        head[start : start + width] = (random.choice(WHOLE) % (1 << 8 * width)).to_bytes(width, "big")
        chunks[0] = chunks[0][0], bytes(head)
    parts = (len(x).to_bytes(4, "big") + k + x + zlib.crc32(k + x).to_bytes(4, "big") for k, x in chunks)
    return data[:8] + b"".join(parts)


def packed(random: Random, data: bytes, ways: tuple[Mutation, ...]) -> bytes:
    """Changes what a gzip holds."""
    import gzip

    try:
        return gzip.compress(random.choice(ways)(random, gzip.decompress(data)), 1)
    except Exception:
        return several(random, data, BLIND)
