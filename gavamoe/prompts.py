"""Former home of requests, kept for one release: model cards written before say `from gavamoe.prompts import`."""

from gavamoe.generation.request import ExplanationRequest

__all__ = ["ExplanationRequest"]
