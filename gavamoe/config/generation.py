"""Settings of decoding, in evaluation and in serving."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from gavamoe.config.section import Count, NonNegative, Section


class GenerationConfig(Section):
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
    choose: bool = False
    """Whether training ends with a choice among a few ways of decoding, on validation rows; the chosen one stands in
    the artifact and is used in place of these settings."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the explainer's weights while it writes; auto: bfloat16 on a GPU, float32 on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Bits of the explainer's large matrices while it writes on a CPU. They are
    packed from the float32 weights of the artifact, which stays as it is."""

    @model_validator(mode="after")
    def _lengths_in_order(self) -> "GenerationConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self
