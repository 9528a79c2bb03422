"""Former home of the generator, kept for one release: model cards written before say `from gavamoe.generate import`."""

from gavamoe.generation.generator import ExplanationGenerator as Explainer

__all__ = ["Explainer"]
