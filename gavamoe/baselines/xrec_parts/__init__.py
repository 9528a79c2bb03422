"""What XRec is made of, beside its adapters and its language model.

    lightgcn   vectors of users and items, learned from the pairs alone
    profiles   features of users and items, counted without a training row's own
    prompt     prompts with two slots, as token ids
    injection  vectors added to queries, keys and values of some positions

Shape letters: U users, I items, N nodes, E edges, D vector size or width, B rows, S positions.
"""
