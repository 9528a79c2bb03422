"""GaVaMoE: explainable recommendation with a Gaussian-variational gated mixture of experts.

The names below are the public interface; each is imported when it is first used, so that `gavamoe --help` answers at
once. `docs/python.md` shows them at work. transformers' Auto classes know the model after `import gavamoe`, whichever
of the two packages is imported first.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gavamoe.config.files import load_config
    from gavamoe.data.dataset import open_dataset
    from gavamoe.evaluation.evaluate import evaluate_run
    from gavamoe.generation.generator import ExplanationGenerator
    from gavamoe.generation.request import ExplanationRequest
    from gavamoe.model.explainer import GavamoeConfig, GavamoeForCausalLM
    from gavamoe.pipeline import train_run

__version__ = "0.1.0"

_HOMES = {
    "ExplanationGenerator": "gavamoe.generation.generator",
    "ExplanationRequest": "gavamoe.generation.request",
    "GavamoeConfig": "gavamoe.model.explainer",
    "GavamoeForCausalLM": "gavamoe.model.explainer",
    "evaluate_run": "gavamoe.evaluation.evaluate",
    "load_config": "gavamoe.config.files",
    "open_dataset": "gavamoe.data.dataset",
    "train_run": "gavamoe.pipeline",
}
"""Public name -> the module that defines it."""

__all__ = [
    "ExplanationGenerator", "ExplanationRequest", "GavamoeConfig", "GavamoeForCausalLM", "__version__", "evaluate_run",
    "load_config", "open_dataset", "train_run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gavamoe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_MODEL = "gavamoe.model.explainer"
"""Registers itself with the Auto classes when it is imported."""


class _AfterAutoClasses(MetaPathFinder):
    """Imports the model once transformers' Auto classes are imported: importing both right away would take seconds."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_both(module: Any) -> None:
                load(module)
                import_module(_MODEL)

            # one loader is wrapped, not its class: mypy knows no way to say so
            spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


if _AUTO_CLASSES in sys.modules:
    import_module(_MODEL)
else:
    sys.meta_path.insert(0, _AfterAutoClasses())
