"""GaVaMoE: explainable recommendation with a Gaussian-variational gated mixture of experts."""

__version__ = "0.1.0"
