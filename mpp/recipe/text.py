"""YAML as plain values and back. No tag is obeyed, nothing is interpolated, and a text costs what its length says.

Numbers may have exponents without a point (1e-3), and dates stay texts; for the rest it is YAML 1.1 as PyYAML has it.
"""

import re
from typing import Any

import yaml  # type: ignore[import-untyped]
from yaml import YAMLError

# What PyYAML raises beside its own errors: "!!bool a", "[[[...", a number of 5000 digits, bytes that are no text.
NO_YAML = (YAMLError, ValueError, AttributeError, KeyError, RecursionError)
DEEPEST = 100  # sections and lists within one another; a recipe has five
FREE = 10_000  # values that any text may have; above, no more than it has bytes, which no text without aliases does
BASE = getattr(yaml, "CSafeLoader", yaml.SafeLoader), getattr(yaml, "CSafeDumper", yaml.SafeDumper)
FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+
    |[-+]?\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)


class _Loader(BASE[0]):  # type: ignore[misc, valid-type]
    """PyYAML's safe loader with resolvers of its own."""


class _Dumper(BASE[1]):  # type: ignore[misc, valid-type]
    """Quotes each text that the loader, or PyYAML's own, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))


def read_yaml(text: str) -> Any:
    """The values of a text: dicts, lists, texts, numbers, truth values and None, none of them shared.

    Raises one of NO_YAML: also for a key given twice, an alias of itself, and aliases that stand for more values than
    the text has bytes, as in a "billion laughs".
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (values := _values(node, {}, 1)) > max(FREE, len(text)):
            raise _refused(node, f"aliases stand for {values} values, more than the text has bytes")
        return _unshared(loader.construct_document(node))
    finally:
        loader.dispose()


def write_yaml(values: Any) -> str:
    """Values as a text that `read_yaml` gives back equal; tuples become lists."""
    return yaml.dump(values, Dumper=_Dumper, default_flow_style=False, sort_keys=False, allow_unicode=True, width=2**30)


def _values(node: Any, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for, those behind its aliases counted each time; every node is visited once."""
    if (found := known.get(id(node))) is not None:
        if not found:
            raise _refused(node, "an alias of itself")
        return found
    if depth > DEEPEST:
        raise _refused(node, f"nested more than {DEEPEST} deep")
    if isinstance(node, yaml.ScalarNode):
        return 1
    known[id(node)] = 0  # while its own values are counted
    total, keys = 1, set[tuple[str, str]]()
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            total += _values(part, known, depth + 1)
        if isinstance(child, tuple) and isinstance(child[0], yaml.ScalarNode):
            key = child[0].tag, child[0].value
            if key in keys:
                raise _refused(child[0], f"found duplicate key {child[0].value}")
            keys.add(key)
    known[id(node)] = total
    return total


def _refused(node: Any, why: str) -> YAMLError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def _unshared(value: Any) -> Any:
    """What an alias stands for, as a value of its own."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list | tuple) else value
