"""Run configuration: every setting with its bounds, as pydantic models; `config_files` reads and writes them.

One value has one home here; numbers that follow from others are properties.
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
    """K: mixture components, and so the gates of stage 2. Its only home."""
    embedding_size: PositiveInt = 768
    """Width of the user and item embeddings and of the encoder."""
    latent_size: PositiveInt = 128
    """Dimensions of z."""
    encoder_layers: PositiveInt = 2
    encoder_heads: PositiveInt = 8
    encoder_feedforward: PositiveInt = 768
    """Width of the encoder's feed-forward layers; the paper names none, and wider ones found nothing more."""
    decoder_hidden: PositiveInt = 256
    """Width of the 2-layer MLP decoder."""
    dropout: Rate = 0.1
    likelihood: Literal["auto", "categorical", "bernoulli", "gaussian"] = "auto"
    """p(x|z). auto: categorical over a small rating scale, Gaussian over others, Bernoulli (Eq. 7) without ratings."""
    negatives: PositiveInt = 4
    """Sampled unobserved items per observed pair and epoch; only without ratings."""
    unknown_id_rate: Rate = 0.05
    """Share of ids replaced by the unknown id in training, so that users never seen can be served."""

    batch_size: PositiveInt = 1024
    """Pairs per optimizer step, all workers together."""
    learning_rate: Positive = 1e-3
    mixture_learning_rate: Positive = 2e-3
    schedule: Literal["linear", "constant"] = "linear"
    """Of both learning rates over all epochs. linear: they fall to a twentieth; at a constant rate the predictions for
    unknown ids swing from step to step."""
    weight_decay: NonNegative = 1e-4
    clip_norm: Positive = 5.0
    pretrain_epochs: Count = 8
    """Epochs as a plain autoencoder before the mixture is fitted to the latents."""
    epochs: PositiveInt = 8
    """Epochs on the ELBO (Eq. 12)."""
    beta: NonNegative = 0.1
    """Weight of the KL term (Eq. 16)."""
    beta_warmup_epochs: Count = 2
    """Epochs over which beta grows from 0."""
    embedding_init: Literal["spectral", "random"] = "spectral"
    """spectral: from the singular vectors of the training ratings; random: small normal values (the paper's)."""
    mixture_init: Literal["gmm", "random"] = "gmm"
    """gmm: from a Gaussian mixture fitted after pretraining; random: none, which collapses (a control)."""
    user_agreement: NonNegative = 1.0
    """Weight of KL(q(c|u) || gamma): how strongly a pair's responsibilities (Eq. 8) follow its user's cluster, so that
    clusters are of users. 0: the bound alone (the paper's), and the mixture is fitted to pairs, not to users."""
    mixture_restarts: PositiveInt = 4
    patience: Count = 0
    """Stop after this many ELBO epochs without a better validation ELBO; 0: never."""
    min_cluster_share: Rate = 0.02
    """A cluster with a smaller share of training pairs counts as collapsed."""
    on_collapse: Literal["warn", "stop"] = "warn"

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
    """Architecture: LLaMA (rotary positions, SwiGLU) or GPT-2 (learned positions, GELU)."""
    hidden_size: PositiveInt = 192
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    intermediate_size: PositiveInt = 512
    vocabulary: Annotated[int, Field(ge=300, le=200_000)] = 2000
    """Byte-level BPE tokens, special ones included."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchModelConfig":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"heads: hidden_size {self.hidden_size} is no multiple of 2 x heads {self.heads}")
        return self


class ExpertsConfig(_Model):
    """Fine-grained experts behind K gates (section 3.3)."""

    enabled: bool = True
    """False keeps the dense feed-forward layers: the paper's Base."""
    count: PositiveInt = 12
    """rN: experts per block."""
    top_k: PositiveInt = 2
    """Experts that see a token."""
    intermediate_size: Count = 0
    """Width of one expert; 0: the dense width divided by `count`, or the multiple of 8 nearest to that."""
    conversion: Literal["random", "split", "shared"] = "shared"
    """How a dense checkpoint becomes experts. random: new weights (the paper's). split: slices of the dense FFN.
    shared: the dense FFN stays as a shared expert, routed ones add to it and start at zero output."""
    split_by: Literal["position", "importance"] = "position"
    """What `split` cuts: neurons as they stand, or in falling order of the norms of their weights."""
    renormalise: bool = False
    """Divide the kept gate values by their sum; Eq. 11 as printed does not."""
    multi_gate: bool = True
    """False: one gate for all clusters (the paper's ablation without multi-gating)."""
    implementation: Literal["auto", "grouped_mm", "batched_mm", "eager"] = "auto"
    """Expert kernel: transformers' own, or auto: grouped_mm, but a loop for the few tokens of decoding on a CPU."""
    load_balance_weight: NonNegative = 0.0
    router_z_weight: NonNegative = 0.0

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
    """0: none, everything is trained."""
    alpha: Positive = 16.0
    """What an adapter adds is scaled by alpha / rank."""
    dropout: Rate = 0.0
    """On an adapter's input."""


class PromptConfig(_Model):
    """What the language model reads before it writes; never any part of the answer."""

    rating: bool = True
    """The sentiment word that the rating stands for."""
    features: bool = True
    max_features: PositiveInt = 5
    title: bool = True
    """The item's title, where the dataset has one."""
    max_tokens: Annotated[int, Field(ge=16)] = 96
    """Longest prompt; titles, then features, are shortened to fit, the slots never."""
    max_explanation_tokens: Annotated[int, Field(ge=4)] = 64
    """Longest explanation in training, end of text included."""


class Stage2Config(_Model):
    """The explainer (sections 3.3 and 3.4.2) and how it is trained."""

    base_model: str = "scratch"
    """"scratch", a Hugging Face folder, a hub id, a .gguf file, or package:NAME for the one inside a Python package."""
    scratch: ScratchModelConfig = ScratchModelConfig()
    experts: ExpertsConfig = ExpertsConfig()
    lora: LoraConfig = LoraConfig()
    prompt: PromptConfig = PromptConfig()
    routes: Literal["learned", "random", "oracle"] = "learned"
    """Who picks a pair's gate. learned: stage 1 (Eq. 9). Controls: random, a hash of the pair; oracle, the user's
    planted group in synthetic data."""
    alpha: Share = 0.1
    """Weight of the ELBO in the joint loss (Eq. 13)."""
    elbo_batch_size: PositiveInt = 256
    """Stage-1 pairs per stage-2 step and worker, for the ELBO term."""

    batch_size: PositiveInt = 16
    """Rows per forward pass and worker."""
    gradient_accumulation: PositiveInt = 1
    learning_rate: Positive = 1e-3
    expert_learning_rate: NonNegative = 0.0
    """For routed experts and gates; 0: `learning_rate`. With `shared` they start from zero beside a trained model."""
    stage1_learning_rate: Positive = 1e-4
    """For stage 1's own parameters and the shared embeddings."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_share: Rate = 0.05
    """Share of all steps over which the learning rate grows from 0."""
    weight_decay: NonNegative = 0.01
    clip_norm: Positive = 1.0
    epochs: PositiveInt = 3
    max_steps: Count = 0
    """Optimizer steps at most; 0: as many as `epochs` take."""
    validation_rows: PositiveInt = 512
    """Rows of the validation split on which the loss is measured, at most."""
    evaluate_every: Count = 200
    """Optimizer steps between validations; 0: only at the end."""
    checkpoint_every: Count = 200
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep: Literal["best", "last"] = "best"
    """The state that becomes the artifact: of the lowest validation loss after a step or more, or the last; with
    alpha 1, which trains no text, the last. best: rank 0 and each checkpoint hold one more copy of the weights."""
    patience: Count = 0
    """Stop after this many validations without a new best; 0: never."""

    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    expert_parallel: PositiveInt = 1
    """Workers that share the experts of each block: every one holds `experts.count` / so many, and tokens travel."""

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
            raise ValueError("lora.rank: would freeze base_model scratch, which has learnt nothing yet; set 0")
        return self


class GenerationConfig(_Model):
    """How text is made, in evaluation and in serving."""

    max_new_tokens: PositiveInt = 48
    batch_size: PositiveInt = 64
    temperature: NonNegative = 0.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    beams: PositiveInt = 1
    no_repeat_ngram: Count = 0
    """Refuse to repeat n-grams of this length; 0: off."""
    repetition_penalty: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Makes tokens that the text already has less likely; the prompt's do not count; 1: off."""
    min_new_tokens: Count = 0
    """Tokens before the text may end."""

    @model_validator(mode="after")
    def _lengths_in_order(self) -> "GenerationConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self


class EvaluationConfig(_Model):
    """What is measured on a split."""

    rows: Count = 0
    """Rows of the split, chosen by the seed; 0: all."""
    protocol: Literal["given", "predicted", "both"] = "given"
    """given: rating and features of the row (the paper's); predicted: stage 1's rating, the item's usual features."""
    style: Literal["sacrebleu", "peter", "both"] = "sacrebleu"
    """Family of BLEU and ROUGE: the libraries sacrebleu and rouge-score, or the PETER line of papers."""
    probe_rows: Count = 200
    """Rows whose user is swapped and that are read through every gate, at most; 0: nothing beyond n-grams."""
    bertscore_model: str = ""
    """Hub id or folder of the model for BERTScore; empty: not measured."""
    bertscore_layer: Count = 0
    """Layer whose states are compared; 0: bert-score's own choice for a known id, the last layer for a folder."""


class PeterConfig(_Model):
    """The baseline PETER (Li, Zhang and Chen, ACL 2021) in `gavamoe ablate`; its own paper's values but for the
    optimiser. Steps, batch size, schedule and clipping are stage 2's."""

    embedding_size: Annotated[int, Field(ge=2, multiple_of=2)] = 512
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    feed_forward: PositiveInt = 2048
    dropout: Rate = 0.2
    explanation_weight: NonNegative = 1.0
    context_weight: NonNegative = 1.0
    rating_weight: NonNegative = 0.1
    learning_rate: Positive = 1e-3
    """Of AdamW."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "PeterConfig":
        if self.embedding_size % self.heads:
            raise ValueError(f"heads: embedding_size {self.embedding_size} is no multiple of heads {self.heads}")
        return self


class RuntimeConfig(_Model):
    """Where it runs. Nothing here changes what is computed, but for float rounding."""

    workers: PositiveInt = 1
    threads_per_worker: PositiveInt = 1
    gpu: bool = False
    """One GPU per worker."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Of stage 2. torch: one worker, plain data types, no compiler needed."""
    max_failures: Count = 2
    """Times that training is restarted from its last checkpoint after a worker died."""
    min_workers: Count = 0
    """Stage 1 goes on with as few workers when machines are lost, and takes more when they come; 0: it waits for all.
    Stage 2 always waits: DeepSpeed's checkpoints belong to a number of workers."""
    wait_minutes: Positive = 4
    """How long workers may take to start, also on machines that an autoscaler first has to get; then training fails."""
    tracking: Literal["none", "mlflow", "wandb"] = "none"
    """A service that gets the log's numbers, beside TensorBoard's files."""
    tracking_uri: str = ""
    """Its address; empty: mlflow.db in the run's logs for mlflow, the environment's for wandb."""

    @model_validator(mode="after")
    def _fewer_at_least(self) -> "RuntimeConfig":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is above workers {self.workers}")
        return self


class RunConfig(_Model):
    """Everything that decides a run, apart from the data."""

    seed: Count = 0
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    peter: PeterConfig = PeterConfig()
    runtime: RuntimeConfig = RuntimeConfig()

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
            problem = f"runtime.workers {self.runtime.workers} is no multiple of {share}"
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
