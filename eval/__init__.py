"""What an encoder is worth: frozen features and what can be read off them.

The public names are resolved when they are first used.
"""

import importlib

if __name__ != "mpp.eval":
    raise ImportError("import mpp.eval, not eval: under two names every class here would exist twice")

_HOMES = {
    "PROTOCOLS": "mpp.eval.probes.protocols",
    "Row": "mpp.eval.probes.task",
    "few_shot_accuracy": "mpp.eval.probes.few_shot",
    "knn_accuracy": "mpp.eval.probes.knn",
    "linear_probe": "mpp.eval.probes.linear",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"mpp.eval has no {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
