"""Settings of stage 2: the base model, experts, adapters, prompts, and their training."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from gavamoe.config.section import Count, NonNegative, Positive, Rate, Section, Share


class ScratchModelConfig(Section):
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
    tie_word_embeddings: bool = True
    """Whether one matrix both reads words and predicts them. False: two, `vocabulary` x `hidden_size` weights more."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchModelConfig":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"heads: hidden_size {self.hidden_size} is not a multiple of 2 x heads {self.heads}")
        return self


class ExpertsConfig(Section):
    """Fine-grained experts behind K gates (section 3.3)."""

    enabled: bool = True
    """Whether the feed-forward layers are blocks of experts. False keeps the dense layers: the paper's Base."""
    count: PositiveInt = 12
    """rN: number of routed experts in each block."""
    top_k: PositiveInt = 2
    """Number of experts that see a token."""
    intermediate_size: Count = 0
    """Width of one expert; 0: the dense width divided by `count`, or the multiple of 8 nearest to that."""
    conversion: Literal["random", "split", "shared", "upcycle", "lora"] = "shared"
    """Conversion of a dense checkpoint's feed-forward networks into experts. random: new weights (the paper's). split:
    slices of the dense feed-forward network. shared: that network stays as a shared expert, and routed ones, copies of
    its neurons with zero output, add to it. upcycle: its strongest neurons leave the shared expert, and each routed one
    is a copy of them. lora: the base model is frozen, and routed experts are low-rank additions to its layers."""
    lora_rank: PositiveInt = 8
    """Rank of each expert of conversion lora; they share the matrix that reads, and each has its own that writes."""
    split_by: Literal["position", "importance"] = "position"
    """Order of the dense network's neurons before `split` cuts it: as they stand, or by falling norms of their
    weights."""
    renormalise: bool = False
    """Whether the gate values of the chosen experts are divided by their sum with the conversions random and split too;
    Eq. 11 as printed does not. With shared, upcycle and lora they always are."""
    scale: NonNegative = 0.0
    """Factor on the routed experts' output. 0: with conversion shared the dense width over that of one expert, so that
    routed experts learn as fast as the dense network beside them; with lora 16; else 1."""
    gate_bias: NonNegative = 0.0
    """Start of a bias that each gate adds for the experts that it owns: those whose number is the gate's plus a
    multiple of the number of gates. Each gate so begins with experts of its own, and may borrow others. 0: no bias."""
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

    @model_validator(mode="after")
    def _upcycle_keeps_the_output(self) -> "ExpertsConfig":
        if self.conversion == "upcycle" and self.scale not in (0, 1):
            raise ValueError(f"scale: {self.scale:g} would keep conversion upcycle from starting as the dense model")
        return self

    @property
    def renormalised(self) -> bool:
        """Whether the gate values of the chosen experts are divided by their sum."""
        return self.renormalise or self.conversion in ("shared", "upcycle", "lora")


class LoraConfig(Section):
    """Low-rank adapters on the attention; the base model's own weights are then frozen."""

    rank: Count = 0
    """Rank of the adapters; 0: there are none, and everything is trained."""
    alpha: Positive = 16.0
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: Rate = 0.0
    """Dropout rate on the input of each adapter."""


class PromptConfig(Section):
    """The prompt, which the language model reads before it writes; it never holds any part of the answer."""

    instruction: bool = True
    """Whether the prompt says what to do and names its parts in words, as a pretrained model understands. False: marks
    divide the parts; a model trained from nothing learns better by so short a prompt."""
    rating: bool = True
    """Whether the prompt names the sentiment of the rating, as a word."""
    soft_rating: bool = False
    """Whether the rating itself stands there as a soft token in place of the word: between five learned vectors, and
    where stage 1 predicts it the mean over the ratings that may come (CIER's idea). Needs `rating`."""
    features: bool = True
    """Whether the prompt names the features that the explanation is to speak of."""
    max_features: PositiveInt = 5
    """Features in a prompt at most; the first ones are kept."""
    title: bool = True
    """Whether the prompt names the item's title, where the dataset has one."""
    title_last: bool = True
    """Whether the title stands behind the features, so that these are at the same places in every prompt, which a model
    with learned positions (GPT-2) copies from sooner. False: behind the item's slot."""
    quotes: Count = 0
    """Training explanations in the prompt at most: those of the rows most like what is asked for, by features and
    rating. The artifact holds all of them then."""
    quote_tokens: PositiveInt = 24
    """Tokens of a quoted explanation at most."""
    cluster: bool = False
    """Whether the prompt has a slot for the user's cluster: conditioning without gates, to compare gates with."""
    max_tokens: Annotated[int, Field(ge=16)] = 96
    """Tokens of a prompt at most; titles, then features, are shortened to fit, the slots of user and item never."""
    max_explanation_tokens: Annotated[int, Field(ge=4)] = 64
    """Tokens of an explanation in training at most, the end of text included; longer ones are cut."""

    @model_validator(mode="after")
    def _soft_rating_is_a_rating(self) -> "PromptConfig":
        if self.soft_rating and not self.rating:
            raise ValueError("soft_rating: needs rating: true, for it is how the rating is shown")
        return self


class Stage2Config(Section):
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
    """The rule that picks a pair's gate. learned: stage 1 (Eq. 9). Controls: random, a hash of the user; oracle, the
    user's planted group in synthetic data."""
    soft_routes: bool = False
    """Whether a pair's gate values are the mean of all gates' by its responsibilities (Eq. 8). False: those of the
    gate of its likeliest cluster (Eq. 9)."""
    gate_dropout: Rate = 0.0
    """Share of the training rows whose responsibilities are replaced by the clusters' shares of all training rows, as
    for a user of whom nothing is known; needs `soft_routes`."""
    slot_dropout: Rate = 0.0
    """Share of the training rows whose user is the unknown one, where that is more than `stage1.unknown_id_rate`: the
    gate alone then tells of the user, as with users never seen."""
    shared_first: Rate = 0.0
    """Share of the steps in which all is trained but gates and routed experts; after them these alone, on what is left
    over (residual training), each part on a schedule of its own. 0: everything at once. With conversion lora the base
    model is trained in the first part, and frozen in the second."""
    clear_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training rows of each sentiment whose texts are learned: those that say it most clearly, by a reader
    learned from other rows. 1: all. Less makes texts agree with the rating more often, where there are rows enough."""
    extra_width: Count = 0
    """Neurons added to each dense feed-forward layer of a pretrained base model, started at zero output: a control of
    what experts add; needs `experts.enabled` false."""
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
    """Optimizer steps between checkpoints; 0: only at the end, or by `checkpoint_minutes`."""
    checkpoint_minutes: NonNegative = 0.0
    """Minutes after a checkpoint at which another is due, at the next line of the log (every 10 steps), by the first
    worker's clock; 0: by steps only. Baselines go by steps."""
    keep: Literal["best", "last"] = "best"
    """The state that becomes the artifact: the one of the lowest validation loss after a step or more, or the last;
    with alpha 1, which trains no text, the last. best: rank 0 and each checkpoint hold one more copy of the weights."""
    patience: Count = 0
    """Training stops after this many validations without a new best; 0: never."""

    precision: Literal["fp32", "bf16", "bf16_weights"] = "fp32"
    """Data type of the arithmetic. fp32: float32 throughout; bf16: autocast over float32 weights; bf16_weights:
    the explainer's weights themselves but for routers and slots, with float32 master copies in ZeRO's shards: needs
    `zero_stage` 1 or 2."""
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
    def _bf16_weights_need_masters(self) -> "Stage2Config":
        if self.precision == "bf16_weights" and self.zero_stage not in (1, 2):
            why = "has no float32 copies of them" if self.zero_stage == 0 else "lays all types of numbers end to end"
            raise ValueError(
                f"precision: bf16_weights needs zero_stage 1 or 2; {self.zero_stage} {why}; set zero_stage to 2, or"
                " precision to bf16"
            )
        return self

    @model_validator(mode="after")
    def _patience_needs_validations(self) -> "Stage2Config":
        if self.patience and (not self.evaluate_every or self.alpha == 1):
            raise ValueError("patience: needs validations to judge by (evaluate_every above 0, alpha below 1)")
        return self

    @model_validator(mode="after")
    def _lora_needs_weights(self) -> "Stage2Config":
        if self.base_model != "scratch":
            return self
        frozen = " would freeze base_model scratch, which has learned nothing yet;"
        if self.lora.rank:
            raise ValueError(f"lora.rank:{frozen} set it to 0")
        if self.experts.enabled and self.experts.conversion == "lora":
            raise ValueError(f"experts.conversion: lora{frozen} take shared or upcycle")
        if self.extra_width:
            raise ValueError("extra_width: base_model scratch is as wide as scratch.intermediate_size says; set that")
        return self

    @model_validator(mode="after")
    def _options_of_gates(self) -> "Stage2Config":
        if self.extra_width and self.experts.enabled:
            raise ValueError("extra_width: is for dense layers; set experts.enabled to false or this to 0")
        if self.gate_dropout and not self.soft_routes:
            raise ValueError("gate_dropout: needs soft_routes; with them off each row has one gate, none to mix")
        if self.soft_routes and not (self.experts.enabled and self.experts.multi_gate):
            raise ValueError("soft_routes: there is one gate or none to mix; set it to false, or experts.multi_gate")
        if self.shared_first and not (
            self.experts.enabled and self.experts.conversion in ("shared", "upcycle", "lora")
        ):
            raise ValueError(
                "shared_first: needs experts beside a dense network (experts.conversion shared, upcycle or lora);"
                " set it to 0"
            )
        return self
