"""What n-gram scores hide.

    measure          all of the following for one set of texts
    features         features named: the right ones?
    sentiment        does it agree with the rating?
    training_texts   the one sampler of training texts
    memorization     copies from the training texts
    user_swaps       swap the user: what changes?
    gates            swap the gate: is the route right?

Shape letters: N rows (the probed ones where users or gates are swapped), B rows of a batch, U users, T positions,
P scored positions, M tokens, V vocabulary, K gates, L layers, E experts, S experts of a token, D hidden size.
"""
