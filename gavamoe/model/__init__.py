"""The explainer as a Hugging Face model: multi-gate mixture of experts in LLaMA and GPT-2.

    router        multi-gate router, its auxiliary losses
    experts       experts of a block, their kernels
    block         both in the place of a feed-forward layer
    decoders      LLaMA and GPT-2 with such blocks
    conversion    dense weights -> experts
    output_head   hidden states -> logits, or the loss of labeled tokens
    explainer     the Hugging Face model class
    build         an explainer from a dense model, or from a saved folder
    slots         token ids of users, items and ratings
    base_model    from scratch, a folder, a hub id, GGUF; tokenizers
    base_config   a base model's config alone, shipped for known models
    base_weights  whether a base model's weights are whole
    quantized     the large matrices in 8 or 4 bits, for writing on a CPU
    lora          adapters on its attention; merged for the artifact

Shape letters: B rows, T positions, M = B x T tokens, D hidden size, E slot size (stage 1's embedding), V vocabulary,
N = rN experts, S = top_k experts of a token, I width of one expert, K gates (one per cluster).
"""
