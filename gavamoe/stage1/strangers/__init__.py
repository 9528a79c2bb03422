"""Users that training never saw, from a few ratings and sentences of theirs, without training.

    history  what a stranger gives: its form, its bounds, reading it
    fold_in  cluster, latent and ratings of a stranger, in closed form

Shape letters: H entries of a history, E embedding size, K clusters, N pairs.
"""
