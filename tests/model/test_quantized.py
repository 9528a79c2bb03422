"""Explainers in 8 and 4 bits: near the float32 ones, in every block, and refused where there are no such kernels."""

from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.explainers import dense_model, explainer, slot_batch
from helpers.exported_runs import run, trained
from torch import Tensor, nn

from gavamoe.errors import InputError
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.quantized import Int4Linear, Int8ExpertLinear, Int8Linear, QuantizedExperts, quantize

BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("llama", {"conversion": "shared", "intermediate_size": 32}),
    "upcycle": ("llama", {"conversion": "upcycle", "intermediate_size": 32}),
    "split": ("llama", {"conversion": "split"}),
    "random, gpt2": ("gpt2", {"conversion": "random", "intermediate_size": 32}),
    "lora": ("llama", {"conversion": "lora"}),
    "dense": ("llama", {"enabled": False}),
    "dense, gpt2": ("gpt2", {"enabled": False}),
}


def telling(block: str) -> GavamoeForCausalLM:
    family, experts = BLOCKS[block]
    model = explainer(dense_model(family), **experts).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.1, generator=generator)
            if ".router." in name:  # so clear choices that rounding flips none
                parameter.normal_(std=3.0, generator=generator)
    return model


@torch.no_grad()
def logits(model: GavamoeForCausalLM, rows: int) -> Tensor:
    ids, mask, clusters = slot_batch(model)
    found: Tensor = model(input_ids=ids[:rows], attention_mask=mask[:rows], cluster_ids=clusters[:rows]).logits
    return found[mask[:rows] == 1]


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.06), ("int4", 0.3)])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_logits_stay_near(block: str, kind: Any, most: float) -> None:
    model = telling(block)
    expected = [logits(model, 3), logits(model, 1)]
    quantized = quantize(model, kind)
    for wanted, rows in zip(expected, (3, 1), strict=True):
        error = (logits(quantized, rows) - wanted).square().mean().sqrt() / wanted.std()
        assert 0 < error < most


def test_no_large_matrix_is_left(tmp_path: Path) -> None:
    del tmp_path
    model = quantize(telling("shared"), "int8")
    left = {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    assert not left
    kinds = {type(module) for module in model.modules()}
    assert {Int8Linear, QuantizedExperts} <= kinds
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert all("embed" in name or "router" in name or "projection" in name for name in sizes), sizes


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_s_weights_are_rounded_by_output_or_group(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        layer.weight[3] *= 100  # one loud output takes nothing from the others
    hidden = torch.randn(2, 5, 64)
    wanted = layer(hidden).detach()
    quiet = [index for index in range(48) if index != 3]
    for made, most in ((Int8Linear, 0.02), (Int4Linear, 0.12)):
        found = made(layer.weight, layer.bias)(hidden)
        assert found.shape == wanted.shape
        error = (found - wanted)[..., quiet].square().mean().sqrt() / wanted[..., quiet].std()
        assert 0 < error < most


def test_in_4_bits_a_weight_of_0_stays_0() -> None:
    """Whatever the group's other weights are: else thousands of small weights are all wrong by the same amount."""
    weight_OD = torch.zeros(16, 64)
    weight_OD[:, 0], weight_OD[:, 1] = torch.linspace(-0.9, -0.1, 16), torch.linspace(0.1, 0.7, 16)
    weight_OD[:8, 32] = 0.4  # and groups on one side of 0
    inputs_1D = torch.ones(1, 64)
    inputs_1D[:, [0, 1, 32]] = 0
    output_1O = Int4Linear(weight_OD)(inputs_1D)
    assert output_1O.abs().max() < 61 * 0.002, "rounding of the scales to bfloat16 alone"


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize(("made", "most"), [(Int8Linear, 0.02), (Int4Linear, 0.15)])
def test_a_loud_row_takes_nothing_from_the_rows_beside_it(made: Any, most: float, rows: int) -> None:
    """As a language model's first token is loud: one scale for all that is read would round the others away."""
    layer = nn.Linear(64, 48)
    hidden = torch.randn(rows, 64)
    hidden[0] *= 3000
    wanted = layer(hidden).detach()[1:]
    error = (made(layer.weight, layer.bias)(hidden)[1:] - wanted).square().mean().sqrt() / wanted.std()
    assert 0 < error < most


def test_a_few_loud_inputs_leave_the_others_their_bits() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(96, 64) * 0.1, torch.randn(40, 64)
    hidden[:, :3] *= 30
    hidden[:, 5] = weight[:, 6] = 0  # nothing is divided by the loudness of silence
    wanted = hidden @ weight.T
    plain = (Int8Linear(weight)(hidden) - wanted).square().mean()
    shared = (Int8Linear(weight, None, hidden.square().mean(0).sqrt())(hidden) - wanted).square().mean()
    assert shared < plain / 4


def test_how_loud_the_inputs_of_layers_are_is_heard_in_the_model() -> None:
    model = telling("upcycle")
    with torch.no_grad():
        model.model.norm.weight[5] = 20.0
        model.model.layers[0].post_attention_layernorm.weight[7] = 20.0
    state = torch.get_rng_state()
    quantized = quantize(model, "int8")
    assert torch.equal(torch.get_rng_state(), state)
    block = quantized.model.layers[0].mlp
    for layer, loudest in (
        (quantized.lm_head._linear, 5),  # type: ignore[union-attr]
        (block.shared_expert.up_proj, 7),
    ):
        assert layer._quieter_D.argmin() == loudest
        assert layer._quieter_D.isfinite().all()


def test_shapes_that_four_bits_can_not_hold_get_eight() -> None:
    model = quantize(explainer(dense_model(), conversion="shared", intermediate_size=24).float(), "int4")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.writes[0], Int8ExpertLinear)  # 24 inputs are no whole groups
    assert isinstance(experts.reads[0], Int4Linear)


def test_an_experts_layer_says_the_same_of_few_rows_and_of_many() -> None:
    torch.manual_seed(0)
    weight_OD, bias_O, hidden_MD = torch.randn(32, 48), torch.randn(32), torch.randn(60, 48)
    layer, wanted_MO = Int8ExpertLinear(weight_OD, bias_O), hidden_MD @ weight_OD.T + bias_O
    few_MO = torch.cat([layer(part) for part in hidden_MD.split(7)])
    for output_MO in (layer(hidden_MD), few_MO):
        assert float((output_MO - wanted_MO).norm() / wanted_MO.norm()) < 0.01
    assert layer(hidden_MD[:0]).shape == (0, 32)


def test_other_formats_are_refused() -> None:
    with pytest.raises(InputError, match=r"generation\.quantize int8: is for writing on a CPU, from float32 weights"):
        quantize(explainer(dense_model()).to(torch.bfloat16), "int8")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_texts_of_a_run_are_written_and_the_artifact_stays_as_it_is(kind: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained().rglob("*") if path.is_file()}
    full = ExplanationGenerator.load(run().stage2)
    small = ExplanationGenerator.load(run().stage2, bits=kind)
    requests = [ExplanationRequest(user, item) for user in range(8) for item in range(3)]
    generation = run().config.generation
    wanted, found = (writer.explain(requests, generation) for writer in (full, small))
    # A tiny model is often undecided: one other word, and the rest of a text is another.
    alike = [SequenceMatcher(None, a.text, b.text).ratio() for a, b in zip(wanted, found, strict=True)]
    assert sum(alike) / len(alike) > 0.5
    assert all(text.text for text in found)
    assert {path: path.stat().st_mtime_ns for path in trained().rglob("*") if path.is_file()} == before


def test_a_batch_and_its_rows_alone_are_near(tmp_path: Path) -> None:
    """What a layer reads is rounded by one scale for all rows, so rows beside it move a row a little, and no more."""
    del tmp_path
    model = quantize(telling("shared"), "int8")
    together, alone = logits(model, 3)[:9], logits(model, 1)
    assert (together - alone).square().mean().sqrt() / alone.std() < 0.06
