"""Settings of stage 1: the VAE, its mixture, and their training."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from gavamoe.config.section import Count, NonNegative, Positive, Rate, Section

HashRows = Annotated[int, Field(ge=1, le=10**9)]


class Stage1Config(Section):
    """The VAE with a Gaussian-mixture latent (section 3.2) and how it is trained (section 4.2)."""

    clusters: Annotated[int, Field(ge=1, le=64)] = 3
    """K: the number of mixture components, and so of clusters and of the gates of stage 2."""
    embedding_size: PositiveInt = 768
    """Width of the user and item embeddings and of the encoder."""
    tables: Literal["replicated", "sharded", "hashed"] = "replicated"
    """Where the embeddings are. replicated: every worker holds a row for each user and item; sharded: each worker holds
    a range of the rows and asks the others for theirs, and what comes after stage 1 looks rows up in memory-mapped
    files, without training them; hashed: a user's embedding is the sum of `hashes` rows of a table of
    `user_hash_rows`, which others share, and an item's likewise."""
    hashes: Annotated[int, Field(ge=1, le=4)] = 3
    """Number of rows, named by as many hash functions, whose sum is an embedding of hashed tables."""
    user_hash_rows: HashRows = 1_000_000
    """Rows of a hashed table of users at most; it has no more than there are users."""
    item_hash_rows: HashRows = 1_000_000
    """Rows of a hashed table of items at most; it has no more than there are items."""
    latent_size: PositiveInt = 128
    """Number of dimensions of the latent z."""
    encoder_layers: PositiveInt = 2
    """Number of transformer layers in the encoder."""
    encoder_heads: PositiveInt = 8
    """Number of attention heads of each encoder layer; must divide `embedding_size`."""
    encoder_feedforward: PositiveInt = 768
    """Width of the encoder's feed-forward layers. The paper gives no value; wider ones gained nothing."""
    decoder_hidden: PositiveInt = 256
    """Width of the hidden layer of the decoder, a 2-layer MLP."""
    dropout: Rate = 0.1
    """Dropout rate in encoder and decoder."""
    likelihood: Literal["auto", "categorical", "bernoulli", "gaussian"] = "auto"
    """Distribution p(x|z) of a pair's rating. auto: Gaussian, and Bernoulli (Eq. 7) for data without ratings;
    categorical: over the values of a small rating scale."""
    rating_biases: bool = True
    """Whether the Gaussian likelihood's mean starts from how far user and item rate above or below the mean, fitted in
    closed form and shrunk by how little is known of each; the latent then explains the rest. false: the latent has to
    carry that too (the paper's)."""
    negatives: PositiveInt = 4
    """Unobserved items sampled per observed pair and epoch; only used for data without ratings."""
    unknown_id_rate: Rate = 0.05
    """Share of user ids, and of item ids, replaced by the unknown id in training (id dropout, in both stages), so that
    users and items never seen can be served."""

    batch_size: PositiveInt = 1024
    """Pairs per optimizer step, all workers together."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the embeddings and networks."""
    mixture_learning_rate: Positive = 2e-3
    """Peak learning rate of the mixture's parameters."""
    schedule: Literal["linear", "constant"] = "linear"
    """Schedule of both learning rates over all epochs. linear: they fall to a twentieth; constant: they stay, and the
    predictions for unknown ids swing from step to step."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay of the embeddings and networks; the mixture has none."""
    clip_norm: Positive = 5.0
    """Gradients are scaled down to this joint norm where theirs is larger."""
    pretrain_epochs: Count = 8
    """Epochs as a plain autoencoder before the mixture is fitted to the latents."""
    epochs: PositiveInt = 8
    """Epochs on the ELBO (Eq. 12), after the pretraining."""
    beta: NonNegative = 0.1
    """Weight of the KL term in the ELBO (Eq. 16)."""
    beta_warmup_epochs: Count = 2
    """Epochs on the ELBO over which the weight of the KL term grows from 0 to `beta`."""
    embedding_init: Literal["spectral", "random"] = "spectral"
    """Initialization of the embeddings. spectral: from the singular vectors of the training ratings; random: small
    normal values (the paper's)."""
    mixture_init: Literal["gmm", "random"] = "gmm"
    """Initialization of the mixture. gmm: from a Gaussian mixture fitted after pretraining; random: from random means,
    which collapses (a control)."""
    user_agreement: NonNegative = 1.0
    """Weight of KL(q(c|u) || gamma): how strongly a pair's responsibilities (Eq. 8) follow its user's cluster, so that
    clusters are of users. 0: the bound alone (the paper's), and the mixture is fitted to pairs, not to users."""
    word_evidence: NonNegative = 100.0
    """Number of a user's words that count as evidence of the user's cluster, beside ratings; further ones lower the
    weight of each. 0: ratings alone decide (the paper's)."""
    vocabulary: PositiveInt = 1000
    """Number of words and punctuation marks, the most frequent of the training texts, that are such evidence."""
    mixture_restarts: PositiveInt = 4
    """Number of fits of the Gaussian mixture from different starts, of which the likeliest is taken."""
    patience: Count = 0
    """Training stops after this many ELBO epochs without a better validation ELBO; 0: never."""
    min_cluster_share: Rate = 0.02
    """Share of the training pairs below which a cluster counts as collapsed."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """Reaction to a collapse. warn: a line in the log; stop: training fails."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Stage1Config":
        if self.embedding_size % self.encoder_heads:
            raise ValueError(
                f"encoder_heads: {self.encoder_heads} does not divide embedding_size {self.embedding_size}"
            )
        return self
