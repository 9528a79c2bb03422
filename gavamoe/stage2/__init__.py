"""Joint training of the explainer and stage 1; DeepSpeed or plain torch.

    train             the training loop
    setup             what the loop starts from
    preflight         what would stop it, found before stage 1
    schedule          the learning rate's schedule
    best_state        which state is kept, and when to stop
    model_card        the folder it leaves, with a model card
    joint_model       both stages around shared embeddings (Eq. 13)
    batches           tokenized rows, their order, tensors
    tokenized_rows    a dataset's rows as token ids
    clear_texts       the training rows whose texts say their rating
    token_cache       the same, made once, beside the dataset
    training_engines  picks one of `engines`: DeepSpeed or plain torch
    expert_movement   whether the routed experts learn
    step_batches      a worker's batches of each step, collated one step ahead

Shape letters: N rows of a split, B rows of a batch, T tokens of a row, A accumulated batches of an optimizer step,
W workers, P stage-1 pairs. In engines.expert_parallel M tokens of a worker, D hidden size, S experts of a
token, P = M x S assignments of tokens to experts, X experts of a block, L = X / W experts of a worker, Q assignments
that arrive at a worker.
"""
