"""Low-rank adapters (LoRA, through peft) on the attention of a baseline's language model.

A pretrained model with adapters is frozen but for these; a scratch model, which has learned nothing yet, has none and
is trained whole.
"""

from typing import Any, Literal, Self

from gavamoe.baselines.language_model import LanguageBaseline, LanguageSpec
from gavamoe.config.baselines import CierConfig, GReferConfig
from gavamoe.config.schema import RunConfig

_ADAPTED = {
    ("llama", "query_key"): r".*self_attn\.[qk]_proj",
    ("llama", "attention"): r".*self_attn\.[qkvo]_proj",
    ("gpt2", "query_key"): r".*attn\.c_attn",  # its queries, keys and values are one matrix
    ("gpt2", "attention"): r".*attn\.c_(attn|proj)",
}
"""Names of the adapted matrices, by architecture and setting."""


class AdaptedSpec(LanguageSpec):
    """A spec with a language model that may have adapters."""

    lora_rank: int
    """Rank of the adapters; 0: there are none."""
    lora_alpha: float
    """Their output is multiplied by alpha / rank."""
    lora_on: Literal["query_key", "attention"]


class AdaptedBaseline(LanguageBaseline):
    """A baseline around a language model that may have adapters."""

    spec: AdaptedSpec

    @classmethod
    def build(cls, spec: Any) -> Self:
        model = cls(spec)
        model.adapt()
        return model

    def adapt(self) -> None:
        """Put the adapters, which change nothing yet, on the language model."""
        if not self.spec.lora_rank:
            return
        from peft import LoraConfig, inject_adapter_in_model

        family = self.lm.config.model_type
        adapter = LoraConfig(
            r=self.spec.lora_rank,
            lora_alpha=self.spec.lora_alpha,
            target_modules=_ADAPTED[family, self.spec.lora_on],
            fan_in_fan_out=family == "gpt2",  # its weights are stored (in, out)
        )
        inject_adapter_in_model(adapter, self.lm)

    def trained(self, name: str) -> bool:
        """Whether a parameter, by name, is trained: all but the weights of a model that has adapters."""
        return not self.spec.lora_rank or not name.startswith("lm.") or ".lora_" in name


def adapter_settings(config: RunConfig, own: CierConfig | GReferConfig) -> dict[str, Any]:
    """The adapters' part of a spec, from the baseline's section of the config."""
    rank = 0 if config.stage2.base_model == "scratch" else own.lora_rank
    return {"lora_rank": rank, "lora_alpha": own.lora_alpha, "lora_on": own.lora_on}
