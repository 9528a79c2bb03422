"""From a pair to its prompt to its text: one decoding engine behind explain, evaluate and serve.

    request          what is asked for, and the same with all that it leaves out
    prompts          what the model reads, as token ids
    artifact         what it reads of a stage-2 folder
    authorship       training texts that one single user wrote
    forget           a user taken out of a run
    placement        the device and the number format to write in
    generator        explanations from a trained model
    decoding_engine  continuous batching over rows of any cluster
    engine_thread    the engine's thread behind an asyncio loop
    llama_step       one more token of each row in few operations
    graphed_step     the same at fixed places: a CUDA graph
    kv_cache         keys and values of all rows being written
    sampling         the next token of each row
    detokenize       a growing text in pieces

What training rows know of a pair is in `evidence`; texts for a whole file of requests are `batch`.

Shape letters: B rows, T tokens, L read length of the cache, X experts, V vocabulary, K clusters.
"""
