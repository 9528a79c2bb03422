"""Former home of the model classes, kept for one release: model cards written before say `import gavamoe.explainer`."""

from gavamoe.model.explainer import GavamoeConfig, GavamoeForCausalLM, build_explainer, load_explainer

__all__ = ["GavamoeConfig", "GavamoeForCausalLM", "build_explainer", "load_explainer"]
