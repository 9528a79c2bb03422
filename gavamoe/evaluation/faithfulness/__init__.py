"""What n-gram scores hide.

    measure       all of the following for one set of texts
    features      features named: the right ones?
    sentiment     does it agree with the rating?
    training_texts  the one sampler of training texts
    memorization  copies from the training texts
    user_swaps    swap the user: what changes?
    gates         swap the gate: is the route right?

Shape letters: N rows, U users, I items, D training texts, K gates, L layers.
"""
