"""Former home of the model classes, kept for one release: model cards written before say `import gavamoe.explainer`."""

from gavamoe.model.build import build_explainer, load_explainer
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.model.explainer import GavamoeForCausalLM

__all__ = ["GavamoeConfig", "GavamoeForCausalLM", "build_explainer", "load_explainer"]
