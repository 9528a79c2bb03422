"""The decoding pass in few operations: the logits of the model's own forward pass, whatever the block."""

from typing import Any

import pytest
import torch
from helpers.explainers import dense_model, explainer, text_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.kv_cache import SlotCache
from gavamoe.generation.llama_step import LlamaStep
from gavamoe.generation.sampling import Sampling
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.quantized import Quantization, quantize

BLOCKS: dict[str, dict[str, Any]] = {
    "dense": {"enabled": False},
    "random": {"conversion": "random", "intermediate_size": 32},
    "split": {"conversion": "split"},
    "shared": {"conversion": "shared", "intermediate_size": 32},
    "upcycle": {"conversion": "upcycle", "intermediate_size": 32},
    "one gate": {"conversion": "shared", "intermediate_size": 32, "multi_gate": False},
    "one expert": {"conversion": "random", "intermediate_size": 32, "top_k": 1, "renormalise": True},
}
ROWS = 5
CAPACITY = 24


def telling(block: str, family: str = "llama") -> GavamoeForCausalLM:
    """A model whose experts differ and whose gates choose clearly."""
    model = explainer(dense_model(family), **BLOCKS[block])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
            if ".router." in name:
                parameter.normal_(std=2.0, generator=torch.Generator().manual_seed(2))
    return model.float().eval()


@torch.no_grad()
def both_ways(
    model: GavamoeForCausalLM, rows: int, *, static: bool = False, tokens: int = 6
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of some decoding steps over prompts of different length: by the model, and by the pass."""
    ids = text_ids(rows, 3 + rows + tokens)
    clusters = torch.arange(rows) % 3
    found: list[list[Tensor]] = []
    for way in ("model", "pass"):
        cache = SlotCache(model.config.text_config, rows, CAPACITY, model.dtype, "cpu")
        step = LlamaStep.of(model, CAPACITY, static)
        assert step is not None
        logits = []
        for row in range(rows):
            length = 3 + row
            model(
                input_ids=ids[row : row + 1, :length],
                position_ids=torch.arange(length)[None],
                attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool).tril(),
                past_key_values=cache.prefill(row, 1),
                cluster_ids=clusters[row : row + 1],
                use_cache=True,
            )
        position = torch.arange(rows) + 3
        for _ in range(tokens):
            read = ids[torch.arange(rows), position]
            longest = int(position.max()) + 1
            if way == "pass":
                logits.append(step(read, position, clusters, cache, longest))
            else:
                seen = torch.arange(longest)[None] <= position[:, None]
                output = model(
                    input_ids=read[:, None],
                    position_ids=position[:, None],
                    attention_mask=seen[:, None, None],
                    past_key_values=cache.decode(position, longest),
                    cluster_ids=clusters,
                    use_cache=True,
                )
                logits.append(output.logits[:, -1])
            position = position + 1
        found.append(logits)
    return found[0], found[1]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 2, ROWS])
@pytest.mark.parametrize("block", BLOCKS)
def test_logits_are_those_of_the_model(block: str, rows: int, static: bool) -> None:
    for own, fast in zip(*both_ways(telling(block), rows, static=static), strict=True):
        torch.testing.assert_close(fast, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("block", ["dense", "shared", "split"])
def test_quantized_logits_are_those_of_the_model(block: str, kind: Quantization) -> None:
    model = quantize(telling(block), kind)
    for own, fast in zip(*both_ways(model, 1), strict=True):
        # A rounding before a product in 8 bits may move what it reads by one of 127 parts.
        assert float((fast - own).norm() / own.norm()) < 0.05


def test_bfloat16_logits_are_near_those_of_the_model() -> None:
    for own, fast in zip(*both_ways(telling("shared").bfloat16(), 3), strict=True):
        assert float((fast - own).float().norm() / own.float().norm()) < 0.03


def test_biases_of_attention_are_the_model_s_own_too() -> None:
    config = dense_model().config
    config.attention_bias = True
    model = explainer(LlamaForCausalLM(config).double(), **BLOCKS["shared"]).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    for change in (0.0, 0.5):  # in place, behind a pass that was made before
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("k_proj.bias", "v_proj.bias")):
                    parameter.add_(change)
        for own, fast in zip(*both_ways(model, 3), strict=True):
            torch.testing.assert_close(fast, own, rtol=1e-4, atol=1e-4)


def test_the_weights_stay_the_model_s_own() -> None:
    """No second copy, made once, and what the model computes by itself is what it was."""
    model = telling("shared")
    ids, clusters = text_ids(2, 8), torch.tensor([0, 2])
    before = model(input_ids=ids, cluster_ids=clusters).logits
    names = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        LlamaStep.of(model, CAPACITY)
    assert torch.equal(model(input_ids=ids, cluster_ids=clusters).logits, before)
    assert all(torch.equal(parameter, names[name]) for name, parameter in model.named_parameters())
    attention: Any = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()
    fused = attention._gavamoe_fused[0]
    LlamaStep.of(model, CAPACITY)
    assert attention._gavamoe_fused[0] is fused


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("gpt2", {"enabled": False}),
        ("llama", {"conversion": "lora"}),
        ("llama", {"conversion": "shared", "intermediate_size": 32, "gate_bias": 2.0}),
    ],
)
def test_other_models_keep_their_own_pass(family: str, experts: dict[str, Any]) -> None:
    assert LlamaStep.of(explainer(dense_model(family), **experts), CAPACITY) is None


class Counted(TorchDispatchMode):
    """Counts the operations that are carried out inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(model: GavamoeForCausalLM, *, fast: bool) -> int:
    """Operations of one decoding step of four rows, as a GPU has them but for its fused norms."""
    engine = Engine(model, 1, [], slots=4, capacity=CAPACITY)
    engine.step_pass = LlamaStep.of(model, CAPACITY, static=True) if fast else None
    for row in range(4):
        engine.submit(Row(text_ids(4, 6)[row].tolist(), row % 3, Sampling(4, min_new_tokens=4)))
    engine.step()
    engine.step()
    with Counted() as counted, torch.no_grad():
        engine._decode(list(engine.active))
    return counted.count


@pytest.mark.parametrize("block", ["dense", "shared", "random"])
def test_a_step_takes_few_operations(block: str) -> None:
    own, fast = (operations(telling(block), fast=fast) for fast in (False, True))
    assert fast < 0.55 * own, (own, fast)
