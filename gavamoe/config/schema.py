"""Run configuration: every setting with its bounds, as pydantic models; `files` reads and writes them.

Each value has one home here; numbers that follow from others are properties. The docstrings are the fields'
descriptions: each is a sentence that makes sense without its field's name.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Rate = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Stage1Config(_Model):
    """The VAE with a Gaussian-mixture latent (section 3.2) and how it is trained (section 4.2)."""

    clusters: Annotated[int, Field(ge=1, le=64)] = 3
    """K: the number of mixture components, and so of clusters and of the gates of stage 2."""
    embedding_size: PositiveInt = 768
    """Width of the user and item embeddings and of the encoder."""
    latent_size: PositiveInt = 128
    """Number of dimensions of the latent z."""
    encoder_layers: PositiveInt = 2
    """Number of transformer layers in the encoder."""
    encoder_heads: PositiveInt = 8
    """Number of attention heads of each encoder layer; must divide `embedding_size`."""
    encoder_feedforward: PositiveInt = 768
    """Width of the encoder's feed-forward layers. The paper names none, and wider ones found nothing more."""
    decoder_hidden: PositiveInt = 256
    """Width of the hidden layer of the decoder, a 2-layer MLP."""
    dropout: Rate = 0.1
    """Dropout rate in encoder and decoder."""
    likelihood: Literal["auto", "categorical", "bernoulli", "gaussian"] = "auto"
    """Distribution p(x|z) of a pair's rating. auto: categorical over a small rating scale, Gaussian over any other,
    Bernoulli (Eq. 7) for data without ratings."""
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


class ScratchModelConfig(_Model):
    """The small model, with a tokenizer of its own, that `base_model: scratch` trains from nothing."""

    family: Literal["llama", "gpt2"] = "llama"
    """Architecture of the scratch model: LLaMA (rotary positions, SwiGLU) or GPT-2 (learned positions, GELU)."""
    hidden_size: PositiveInt = 192
    """Width of the scratch model's hidden states; a multiple of 2 x `heads`."""
    layers: PositiveInt = 4
    """Number of decoder layers of the scratch model."""
    heads: PositiveInt = 4
    """Number of attention heads of the scratch model."""
    intermediate_size: PositiveInt = 512
    """Width of the scratch model's dense feed-forward layers."""
    vocabulary: Annotated[int, Field(ge=300, le=200_000)] = 2000
    """Tokens of the scratch model's byte-level BPE tokenizer at most, special ones included."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchModelConfig":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"heads: hidden_size {self.hidden_size} is not a multiple of 2 x heads {self.heads}")
        return self


class ExpertsConfig(_Model):
    """Fine-grained experts behind K gates (section 3.3)."""

    enabled: bool = True
    """Whether the feed-forward layers are blocks of experts. False keeps the dense layers: the paper's Base."""
    count: PositiveInt = 12
    """rN: number of routed experts in each block."""
    top_k: PositiveInt = 2
    """Number of experts that see a token."""
    intermediate_size: Count = 0
    """Width of one expert; 0: the dense width divided by `count`, or the multiple of 8 nearest to that."""
    conversion: Literal["random", "split", "shared"] = "shared"
    """Conversion of a dense checkpoint's feed-forward networks into experts. random: new weights (the paper's). split:
    slices of the dense feed-forward network. shared: that network stays as a shared expert, and routed ones add to it
    and start at zero output."""
    split_by: Literal["position", "importance"] = "position"
    """Order of the dense network's neurons before `split` cuts it: as they stand, or by falling norms of their
    weights."""
    renormalise: bool = False
    """Whether the gate values of the chosen experts are divided by their sum; Eq. 11 as printed does not."""
    multi_gate: bool = True
    """Whether each cluster has a gate of its own. False: one gate for all (the paper's ablation without
    multi-gating)."""
    implementation: Literal["auto", "grouped_mm", "batched_mm", "eager"] = "auto"
    """Kernel that runs the experts: one of transformers', or auto: grouped_mm, but a loop for the few tokens of
    decoding on a CPU."""
    load_balance_weight: NonNegative = 0.0
    """Weight of the load-balancing loss, which rewards an even use of the experts by each gate."""
    router_z_weight: NonNegative = 0.0
    """Weight of the router z-loss, which keeps the gates' logits small."""

    @model_validator(mode="after")
    def _top_k_within_count(self) -> "ExpertsConfig":
        if self.top_k > self.count:
            raise ValueError(f"top_k: {self.top_k} is above count {self.count}")
        return self

    @model_validator(mode="after")
    def _split_by_needs_split(self) -> "ExpertsConfig":
        if self.split_by != "position" and self.conversion != "split":
            raise ValueError(f"split_by: {self.split_by} is for conversion split, not {self.conversion}")
        return self


class LoraConfig(_Model):
    """Low-rank adapters on the attention; the base model's own weights are then frozen."""

    rank: Count = 0
    """Rank of the adapters; 0: there are none, and everything is trained."""
    alpha: Positive = 16.0
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: Rate = 0.0
    """Dropout rate on the input of each adapter."""


class PromptConfig(_Model):
    """The prompt, which the language model reads before it writes; it never holds any part of the answer."""

    rating: bool = True
    """Whether the prompt names the sentiment of the rating, as a word."""
    features: bool = True
    """Whether the prompt names the features that the explanation is to speak of."""
    max_features: PositiveInt = 5
    """Features in a prompt at most; the first ones are kept."""
    title: bool = True
    """Whether the prompt names the item's title, where the dataset has one."""
    max_tokens: Annotated[int, Field(ge=16)] = 96
    """Tokens of a prompt at most; titles, then features, are shortened to fit, the slots of user and item never."""
    max_explanation_tokens: Annotated[int, Field(ge=4)] = 64
    """Tokens of an explanation in training at most, the end of text included; longer ones are cut."""


class Stage2Config(_Model):
    """The explainer (sections 3.3 and 3.4.2) and how it is trained."""

    base_model: str = "scratch"
    """Language model that training starts from: "scratch", a Hugging Face folder, a hub id, a .gguf file, or
    package:NAME for the .gguf file inside a Python package."""
    scratch: ScratchModelConfig = ScratchModelConfig()
    """Sizes of the model that `base_model: scratch` trains from nothing."""
    experts: ExpertsConfig = ExpertsConfig()
    """Experts and gates of each block."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters on the base model's attention."""
    prompt: PromptConfig = PromptConfig()
    """Contents of the prompt, and the lengths that prompts and explanations may have."""
    routes: Literal["learned", "random", "oracle"] = "learned"
    """The rule that picks a pair's gate. learned: stage 1 (Eq. 9). Controls: random, a hash of the pair; oracle, the
    user's planted group in synthetic data."""
    alpha: Share = 0.1
    """Weight of the ELBO in the joint loss (Eq. 13); the explanation's loss has the weight 1 - alpha."""
    elbo_batch_size: PositiveInt = 256
    """Stage-1 pairs per optimizer step and worker, for the ELBO term."""

    batch_size: PositiveInt = 16
    """Rows per forward pass and worker."""
    gradient_accumulation: PositiveInt = 1
    """Forward passes whose gradients add up to one optimizer step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the explainer's own parameters."""
    expert_learning_rate: NonNegative = 0.0
    """Peak learning rate of routed experts and gates; 0: that of `learning_rate`. With conversion shared they start
    from zero beside a trained model."""
    stage1_learning_rate: Positive = 1e-4
    """Peak learning rate of stage 1's own parameters and of the shared embeddings."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Schedule of the learning rates after the warm-up: constant, or a fall to 0 along a cosine or a line."""
    warmup_share: Rate = 0.05
    """Share of all steps over which the learning rates grow from 0 to their peak."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay; norms, biases, embedding tables and the mixture have none."""
    clip_norm: Positive = 1.0
    """Gradients are scaled down to this joint norm where theirs is larger."""
    epochs: PositiveInt = 3
    """Passes over the training rows."""
    max_steps: Count = 0
    """Optimizer steps at most; 0: as many as `epochs` take."""
    validation_rows: PositiveInt = 512
    """Rows of the validation split on which the loss is measured, at most."""
    evaluate_every: Count = 200
    """Optimizer steps between validations; 0: only at the end."""
    checkpoint_every: Count = 200
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep: Literal["best", "last"] = "best"
    """The state that becomes the artifact: the one of the lowest validation loss after a step or more, or the last;
    with alpha 1, which trains no text, the last. best: rank 0 and each checkpoint hold one more copy of the weights."""
    patience: Count = 0
    """Training stops after this many validations without a new best; 0: never."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of the arithmetic. bf16: autocast over float32 weights; fp32: float32 throughout."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass, which takes less memory and more time."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed's ZeRO stage: what is sharded over the workers. 0: nothing; 1: optimizer states; 2: gradients too; 3:
    weights too."""
    offload_optimizer: bool = False
    """Whether optimizer states lie in the host's memory; needs `zero_stage` 1 or more."""
    offload_parameters: bool = False
    """Whether weights lie in the host's memory; needs `zero_stage` 3."""
    expert_parallel: PositiveInt = 1
    """Workers that share the experts of each block: each holds `experts.count` / `expert_parallel` of them, and tokens
    go to their experts by all-to-all."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "Stage2Config":
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(f"offload_parameters: needs zero_stage 3, not {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage < 1:
            raise ValueError("offload_optimizer: needs zero_stage 1 or more, not 0")
        return self

    @model_validator(mode="after")
    def _patience_needs_validations(self) -> "Stage2Config":
        if self.patience and (not self.evaluate_every or self.alpha == 1):
            raise ValueError("patience: needs validations to judge by (evaluate_every above 0, alpha below 1)")
        return self

    @model_validator(mode="after")
    def _lora_needs_weights(self) -> "Stage2Config":
        if self.lora.rank and self.base_model == "scratch":
            raise ValueError("lora.rank: would freeze base_model scratch, which has learned nothing yet; set it to 0")
        return self


class GenerationConfig(_Model):
    """Decoding of texts, in evaluation and in serving."""

    max_new_tokens: PositiveInt = 48
    """Tokens of a text at most."""
    batch_size: PositiveInt = 64
    """Texts that are written at the same time."""
    temperature: NonNegative = 0.0
    """Temperature of sampling; 0: greedy, the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sampling is among the likeliest tokens that together have this probability; 1: among all."""
    beams: PositiveInt = 1
    """Width of the beam search; 1: none."""
    no_repeat_ngram: Count = 0
    """N-grams of this length are never written twice in a text; 0: off."""
    repetition_penalty: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Penalty on tokens that the text already has, which makes them less likely; the prompt's do not count; 1: off."""
    min_new_tokens: Count = 0
    """Tokens that a text has before it may end."""

    @model_validator(mode="after")
    def _lengths_in_order(self) -> "GenerationConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self


class EvaluationConfig(_Model):
    """Measures of `gavamoe evaluate`, and the rows of a split that are evaluated."""

    rows: Count = 0
    """Rows of the split that are evaluated, chosen by the seed; 0: all."""
    protocol: Literal["given", "predicted", "both"] = "given"
    """Origin of a request's rating and features. given: from the row (the paper's); predicted: stage 1's rating
    and the item's usual features."""
    style: Literal["sacrebleu", "peter", "both"] = "sacrebleu"
    """Family of BLEU and ROUGE: the libraries sacrebleu and rouge-score, or the PETER line of papers."""
    probe_rows: Count = 200
    """Rows, at most, whose user is swapped and that are read through every gate; 0: n-gram scores only."""
    bertscore_model: str = ""
    """Hub id or folder of the model for BERTScore; empty: it is not measured."""
    bertscore_layer: Count = 0
    """Layer of the BERTScore model whose states are compared; 0: bert-score's own choice for a known id, the last layer
    for a folder."""


class PeterConfig(_Model):
    """The baseline PETER (Li, Zhang and Chen, ACL 2021) in `gavamoe ablate`, with its own paper's values but for the
    optimizer. Steps, batch size, schedule and clipping are stage 2's."""

    embedding_size: Annotated[int, Field(ge=2, multiple_of=2)] = 512
    """Width of PETER's embeddings and hidden states; a multiple of `heads`."""
    layers: PositiveInt = 2
    """Number of PETER's transformer layers."""
    heads: PositiveInt = 2
    """Number of attention heads of each of PETER's layers."""
    feed_forward: PositiveInt = 2048
    """Width of PETER's feed-forward layers."""
    dropout: Rate = 0.2
    """Dropout rate in PETER's layers."""
    explanation_weight: NonNegative = 1.0
    """Weight of the explanation's loss in PETER's total loss."""
    context_weight: NonNegative = 1.0
    """Weight of the loss of context prediction (the explanation's words without their order) in PETER's total loss."""
    rating_weight: NonNegative = 0.1
    """Weight of the rating's squared error in PETER's total loss."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW in PETER's training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "PeterConfig":
        if self.embedding_size % self.heads:
            raise ValueError(f"heads: embedding_size {self.embedding_size} is not a multiple of heads {self.heads}")
        return self


class BaselinesConfig(_Model):
    """Settings of the rival systems that `gavamoe ablate` trains."""

    peter: PeterConfig = PeterConfig()
    """PETER, a small Transformer on the two ids."""


class RuntimeConfig(_Model):
    """Where and how training runs. None of it changes what is computed, but for float rounding."""

    workers: PositiveInt = 1
    """Ray Train workers that train together, each a process."""
    threads_per_worker: PositiveInt = 1
    """CPU threads, and so Ray CPUs, of each worker."""
    gpu: bool = False
    """Whether each worker gets one GPU."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Engine that takes stage 2's optimizer steps. deepspeed: any number of workers, ZeRO; torch: one worker, plain
    data types, no compiler needed."""
    max_failures: Count = 2
    """Times that training is restarted from its last checkpoint after a worker died."""
    min_workers: Count = 0
    """Smallest number of workers with which stage 1 continues when machines are lost; it takes more when they come. 0:
    it waits for all. Stage 2 always waits: DeepSpeed's checkpoints belong to a number of workers."""
    wait_minutes: Positive = 4
    """Minutes that workers may take to start, also on machines that an autoscaler first has to get; then training
    fails."""
    tracking: Literal["none", "mlflow", "wandb"] = "none"
    """Service that gets the log's numbers, beside TensorBoard's files."""
    tracking_uri: str = ""
    """Address of the tracking service; empty: mlflow.db in the run's logs for mlflow, the environment's for wandb."""

    @model_validator(mode="after")
    def _fewer_at_least(self) -> "RuntimeConfig":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is above workers {self.workers}")
        return self


class RunConfig(_Model):
    """Everything that decides a run, apart from the data."""

    seed: Count = 0
    """Seed of every random choice: equal seeds give equal runs."""
    stage1: Stage1Config = Stage1Config()
    """The VAE with a Gaussian mixture, and its training."""
    stage2: Stage2Config = Stage2Config()
    """The explainer, and its training."""
    generation: GenerationConfig = GenerationConfig()
    """Decoding of texts."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measures of `gavamoe evaluate`, and the rows that are evaluated."""
    baselines: BaselinesConfig = BaselinesConfig()
    """Rival systems of `gavamoe ablate`, a section each."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Workers, engine, tracking."""

    @property
    def gates(self) -> int:
        """Gates of the explainer: one per cluster, or one in all without multi-gating."""
        return self.stage1.clusters if self.stage2.experts.multi_gate else 1

    @model_validator(mode="after")
    def _expert_parallel_fits(self) -> "RunConfig":
        stage2, share = self.stage2, self.stage2.expert_parallel
        if share == 1:
            return self
        problem = None
        if not stage2.experts.enabled:
            problem = "there are no experts to share out with experts.enabled false"
        elif stage2.alpha == 1:
            problem = "alpha 1 trains no experts"
        elif stage2.experts.count % share:
            problem = (
                f"{share} workers can't share {stage2.experts.count} experts evenly; take a divisor of experts.count"
            )
        elif self.runtime.workers % share:
            problem = f"runtime.workers {self.runtime.workers} is not a multiple of {share}"
        elif stage2.zero_stage not in (1, 2):
            problem = (
                f"needs zero_stage 1 or 2, not {stage2.zero_stage}: 0 would clip each worker by a norm of its own,"
                " 3 shards the experts itself"
            )
        if problem:
            raise ValueError(f"stage2.expert_parallel: {problem}")
        return self

    @model_validator(mode="after")
    def _runtime_fits(self) -> "RunConfig":
        workers = self.runtime.workers
        if self.runtime.engine == "torch" and workers > 1:
            raise ValueError(f"runtime.engine: torch runs one worker, not {workers}; use deepspeed")
        return self
