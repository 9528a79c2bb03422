"""The variational autoencoder with a Gaussian mixture: ratings, clusters, routes.

    vae_gmm          the model and its ELBO
    train            its training, from dataset to artifact
    trainer          the loop: pretraining, mixture fit, ELBO
    validation       held-out scores, guards against collapse
    pair_stream      the order of pairs, negatives, id dropout
    mixture_init     fitting the mixture to the latents
    user_words       what users write, as evidence of their cluster; what clusters tell of texts
    rating_biases    what user and item say of a rating by themselves
    spectral_init    spectral initialization of the embeddings
    sparse_adam      Adam that touches only the rows of a batch
    routes           pair -> cluster and responsibilities
    route_overrides  random and planted routes, as experiments
    clusters         what each cluster is
    artifact         its model on disk

Shape letters: B pairs of a batch, N pairs, U users, I items, K clusters, L latent dimensions, E embedding size; in
the encoder T the two tokens of a pair, Q those of them that attend, H heads of D; R outputs of the decoder, rows of an
embedding table that a batch uses (sparse_adam), or components (spectral_init); P occurrences of V values (clusters).
"""
