"""Ablations, baselines, choosing K.

    ablate         trains and scores systems, seed by seed
    variants       what is compared
    rates          learning rates, chosen on validation
    cluster_sweep  stage 1 for each K, side by side

Shape letters: U known users, K clusters.
"""
