"""The plan: counts equal the built model, memory and FLOPs equal what runs and what DeepSpeed's estimators say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from benchmarks.training_step import allocated_peak
from gavamoe.config.files import load_config, parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.model import output_head
from gavamoe.model.base_config import base_shape, shipped_shapes
from gavamoe.model.base_model import locate_base
from gavamoe.model.build import adapt, build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.lora import add_lora
from gavamoe.plan.estimate import Hardware, Workload, make_plan
from gavamoe.plan.memory import NUMBERS, Head, Scheme, Shape, activations, head_peak, outer_activations, states
from gavamoe.plan.parameters import RATING_SCALE, draw
from gavamoe.plan.work import pair_cost, row_flops, step_traffic
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.joint_model import JointModel

USERS, ITEMS = 30, 20
ROWS, TOKENS, SCORED = 2, 20, 12
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "openai-community/gpt2": 124_439_808,
}
CONVERSIONS = ("dense", "random", "split", "shared", "upcycle", "lora", "soft")
CASES = [(arch, conversion) for arch in ("llama", "gpt2") for conversion in CONVERSIONS]


def tiny_base(arch: str) -> PreTrainedConfig:
    special = {"bos_token_id": 0, "eos_token_id": 1}
    if arch == "llama":
        return LlamaConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, **special,
        )  # fmt: skip
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(vocab_size=1000, n_embd=64, n_layer=3, n_head=4, n_positions=64, **drop, **special)


def tiny_config(arch: str, conversion: str, *overrides: str) -> RunConfig:
    width = {"llama": 48, "gpt2": 64}[arch]
    experts = {"enabled": conversion != "dense", "count": 4, "top_k": 2, "intermediate_size": width}
    plain = conversion in ("dense", "soft")
    experts |= {"conversion": "shared" if plain else conversion, "implementation": "eager"}
    others = {"soft": ("stage2.soft_routes=true",), "lora": ("stage2.base_model=openai-community/gpt2",)}
    settings = (f"stage2.experts.{name}={value}" for name, value in experts.items())
    return tiny(*settings, *others.get(conversion, ()), *overrides)


def built(config: RunConfig, base: PreTrainedConfig) -> GavamoeForCausalLM:
    dense = AutoModelForCausalLM.from_config(base)
    model = build_explainer(config, dense, ExplainerSizes(USERS, ITEMS, config.stage1.embedding_size, config.gates))
    model.set_attn_implementation("eager")  # torch doesn't count its fused attention on the CPU
    adapt(model, config)
    return model.train()


@pytest.mark.parametrize(("arch", "conversion"), CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_parameters_equal_the_built_model(arch: str, conversion: str, alpha: float) -> None:
    config, base = tiny_config(arch, conversion, f"stage2.alpha={alpha}"), tiny_base(arch)
    joint = JointModel(built(config, base), VaeGmm(config.stage1, USERS, ITEMS, "categorical", RATING_SCALE), alpha)
    plan = draw(config, base, USERS, ITEMS)
    assert plan.whole.total == sum(p.numel() for p in joint.parameters())
    assert plan.whole.trained == sum(p.numel() for p in joint.parameters() if p.requires_grad)
    experts = [p for name, p in joint.named_parameters() if ".experts." in name]
    assert ("experts" in plan.parts) == bool(experts)
    if experts:
        assert plan.parts["experts"].total == sum(p.numel() for p in experts)
        assert plan.parts["experts"].active == plan.parts["experts"].total // (1 if conversion == "lora" else 2)
        assert plan.parts["gates"].total == plan.parts["gates"].active * (1 if conversion == "soft" else 3)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_adapters_are_trained_and_the_base_model_is_not(arch: str) -> None:
    rank = ["stage2.lora.rank=4", "stage2.base_model=openai-community/gpt2"]
    config, base = tiny_config(arch, "shared", *rank), tiny_base(arch)
    model = built(config, base)
    add_lora(model, config.stage2.lora, 0)
    joint = JointModel(model, VaeGmm(config.stage1, USERS, ITEMS, "categorical", RATING_SCALE), config.stage2.alpha)
    plan = draw(config, base, USERS, ITEMS)
    assert plan.whole.total == sum(p.numel() for p in joint.parameters())
    assert plan.whole.trained == sum(p.numel() for p in joint.parameters() if p.requires_grad)
    assert plan.parts["adapters"].trained == plan.parts["adapters"].total > 0
    assert plan.parts["attention"].trained == plan.parts["dense feed-forward"].trained == 0
    everything = draw(tiny_config(arch, "shared"), base, USERS, ITEMS)
    assert states(plan, Scheme(1)).optimizer < states(everything, Scheme(1)).optimizer


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_shipped_shapes_have_the_published_size(hub_id: str) -> None:
    assert set(shipped_shapes()) == set(PUBLISHED)
    base = base_shape(parse_config({"stage2": {"base_model": hub_id}}, "test").stage2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[hub_id]


def test_papers_model() -> None:
    config = load_config("paper")
    plan = draw(config, base_shape(config.stage2), 9765, 6280)
    slots = [plan.parts[name] for name in ("slot tables", "slot projections")]
    assert plan.explainer.total - sum(part.total for part in slots) == 8_437_633_024
    assert plan.explainer.active - sum(part.active for part in slots) == 3_401_322_496


@pytest.mark.parametrize(("arch", "conversion"), CASES)
def test_flops_equal_torchs_count(arch: str, conversion: str) -> None:
    """Within 1 %: biases and norms are no matrix products."""
    config, base = tiny_config(arch, conversion), tiny_base(arch)
    model = built(config, base)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch(model), return_logits=False, use_cache=False).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = row_flops(draw(config, base, USERS, ITEMS), Shape(1, TOKENS, SCORED), checkpointing=False)
    assert ROWS * found.forward == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert ROWS * found.backward == pytest.approx(backward.get_total_flops(), rel=0.01)


def test_flops_with_gradient_checkpointing() -> None:
    config, base = tiny_config("llama", "random"), tiny_base("llama")
    model = built(config, base)
    model.activation_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        model(**batch(model), return_logits=False, use_cache=False).loss.backward()
    found = row_flops(draw(config, base, USERS, ITEMS), Shape(1, TOKENS, SCORED), checkpointing=True)
    assert ROWS * found.total == pytest.approx(counter.get_total_flops(), rel=0.03)


def batch(model: GavamoeForCausalLM) -> dict[str, Tensor]:
    ids = torch.randint(2, 1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, 1], ids[:, 3] = 1000 + torch.arange(ROWS), 1000 + USERS + 1 + torch.arange(ROWS)
    labels = ids.masked_fill(torch.arange(TOKENS) < TOKENS - SCORED, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "cluster_ids": torch.eye(3)[:ROWS] if model.config.soft_routes else torch.arange(ROWS),
    }


@pytest.mark.parametrize(("arch", "conversion"), CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(arch: str, conversion: str, precision: str, checkpointing: bool) -> None:
    """Within 6 %, in the kernels that training uses."""
    config = tiny_config(arch, conversion, "stage2.experts.implementation=auto")
    model = build_explainer(
        config, AutoModelForCausalLM.from_config(tiny_base(arch)), ExplainerSizes(USERS, ITEMS, 16, config.gates)
    ).train()
    shape = Shape(ROWS, TOKENS, SCORED)
    if precision == "bf16_weights":
        stage1 = VaeGmm(config.stage1, USERS, ITEMS, "categorical", RATING_SCALE)
        JointModel(model, stage1, config.stage2.alpha).store_in_bf16()
    if checkpointing:
        model.activation_checkpointing_enable()
    step = {"return_logits": False, "use_cache": False, "right_padded": True}
    kept = kept_bytes(model, lambda: model(**batch(model), **step), precision == "bf16")
    planned = activations(model.config, shape, precision, checkpointing=False, head=Head(trained=False))
    if checkpointing:  # autograd keeps the layers' inputs alone: the layer that is run again comes later
        inputs = 3 * NUMBERS[precision].stream * 64 * shape.count
        planned = outer_activations(model.config, shape, precision, head=Head(trained=False)) + inputs
    # Both gradients of the log-softmax are planned for, but not kept by autograd.
    passing = ROWS * SCORED * 1000 * 2 * 4
    assert planned - passing == pytest.approx(kept, rel=0.06)


def kept_bytes(model: torch.nn.Module, forward: Callable[[], Any], bf16: bool) -> int:
    """Bytes of the distinct storages that a forward pass keeps for the backward one, weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("hidden", "scored"), [(16, 300), (256, 300), (16, 2100), (256, 2100)])
def test_peak_of_head_and_loss_is_what_torch_allocates(
    hidden: int, scored: int, trained: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 %: with all logits at once (300 tokens) and in chunks of 700."""
    monkeypatch.setattr(output_head, "CPU_LOGITS", 700 * 2000)
    head = output_head.OutputHead(hidden, 2000).requires_grad_(trained)
    tokens, targets = torch.randn(scored, hidden, requires_grad=True), torch.randint(2000, (scored,))

    def step() -> None:
        gathered = tokens[torch.arange(scored)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = head(gathered, targets)
        del gathered  # but for what the head keeps, as at the end of the explainer's forward pass
        loss.backward()

    peak = allocated_peak(step)
    precision = "bf16" if bf16 else "fp32"
    assert head_peak(2000, hidden, scored, precision, Head(trained), device="cpu") == pytest.approx(peak, rel=0.05)


def test_stage1_cost_is_that_of_real_tensors() -> None:
    config = tiny_config("llama", "random")
    model = VaeGmm(config.stage1, USERS, ITEMS, "categorical", RATING_SCALE)
    ids = torch.zeros(64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss: Tensor | None = None

        def forward() -> None:
            nonlocal loss
            loss = model.elbo(ids, ids, ids.float(), 0.1).loss

        kept = kept_bytes(model, forward, bf16=False)
        assert loss is not None
        loss.backward()
    found = pair_cost(config.stage1)
    assert 64 * found.flops == counter.get_total_flops()
    assert 64 * found.activations == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_states_agree_with_deepspeeds_estimators(devices: int) -> None:
    """They assume 2-byte weights and gradients beside a float32 copy; ours are float32: the difference is exact."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    config = load_config("paper")
    blueprint = draw(config, base_shape(config.stage2), 9765, 6280)
    total, share = blueprint.whole.total, blueprint.whole.total / devices

    def ours(scheme: Scheme) -> float:
        found = states(blueprint, scheme)
        return found.weights + found.gradients + found.optimizer

    _, theirs = estimate_zero2_model_states_mem_needs(total, devices, 1, cpu_offload=False)
    assert ours(Scheme(2, devices=devices)) == pytest.approx(theirs + 2 * total - 2 * share, rel=1e-6)
    _, theirs, gathered = estimate_zero3_model_states_mem_needs(
        total, blueprint.largest_module, devices, 1, cpu_offload=False, cpu_offload_params=False
    )
    assert ours(Scheme(3, devices=devices)) == pytest.approx(theirs - gathered + 2 * share, rel=1e-6)
    assert states(blueprint, Scheme(3, devices=devices)).buffers >= gathered
    host, _, _ = estimate_zero3_model_states_mem_needs(
        total, blueprint.largest_module, devices, 1, cpu_offload_params=False, additional_buffer_factor=1.0
    )
    if devices > 1:  # on one device they count an 18-byte copy instead
        assert devices * states(blueprint, Scheme(3, True, devices=devices)).host == pytest.approx(host, rel=1e-6)


def plan(config: RunConfig, devices: int, gib: float, **workload: int) -> dict[str, Any]:
    load = Workload(
        **{"users": 9765, "items": 6280, "rows": 256_018, "prompt_tokens": 40, "answer_tokens": 20} | workload
    )
    return make_plan(config, load, Hardware(devices, gib * 2**30, 312e12, 0.4, 200e9))


def test_paper_on_eight_devices() -> None:
    """ZeRO-3 fits into 48 and 80 GiB; keeping all weights on each device fits into neither without checkpointing."""
    small, large = plan(load_config("paper"), 8, 48), plan(load_config("paper"), 8, 80)
    fits = [{row["scheme"]: row["checkpointed"]["fits"] for row in found["memory"]} for found in (small, large)]
    assert [found["ZeRO-3"] for found in fits] == [True, True]
    assert [found["ZeRO-2"] for found in fits] == [False, True]
    assert [found["ZeRO-1"] for found in fits] == [False, False]
    own = [row["scheme"] for row in small["memory"] if row["own"]]
    assert own == ["ZeRO-3"]
    assert small["training"]["steps_per_epoch"] == 4001


def test_the_heads_gradient_counts_once() -> None:
    """Beside an accumulated or a sharded gradient it is one more; otherwise it is among the gradients."""
    many = plan(load_config("paper", ["stage2.alpha=0"]), 8, 80)["memory"]
    one = plan(load_config("paper", ["stage2.alpha=0", "stage2.gradient_accumulation=1"]), 8, 80)["memory"]
    for stage, more in enumerate([4 * 128_256 * 4096] * 2 + [0] * 2):
        assert many[stage]["plain"]["activations"] - one[stage]["plain"]["activations"] == pytest.approx(more)


def test_devices_share_out_states_and_time_but_not_traffic() -> None:
    one, many = (plan(load_config("paper"), devices, 80) for devices in (8, 64))
    last = [found["memory"][3]["plain"] for found in (one, many)]
    assert last[0]["optimizer"] == 8 * last[1]["optimizer"]
    assert many["training"]["epoch_seconds"]["compute"] == pytest.approx(
        one["training"]["epoch_seconds"]["compute"] / 8, rel=0.01
    )
    assert many["traffic"][3]["total"] == pytest.approx(one["traffic"][3]["total"] * 63 / 64 / (7 / 8))


def test_shared_experts_cost_tokens_instead_of_memory() -> None:
    """Each device holds 1 / 4 of the experts, whose gradients go to the other replica alone."""
    apart = load_config("paper", ["stage2.zero_stage=2"])
    shared = load_config("paper", ["stage2.zero_stage=2", "stage2.expert_parallel=4"])
    found = [plan(config, 8, 80) for config in (apart, shared)]
    rows = [next(row["plain"] for row in each["memory"] if row["own"]) for each in found]
    experts = found[0]["parameters"]["parts"]["experts"]["total"]
    assert rows[0]["weights"] - rows[1]["weights"] == pytest.approx(4 * experts * 3 / 4)
    assert rows[0]["optimizer"] == rows[1]["optimizer"]
    assert {row["scheme"] for row in found[1]["traffic"]} == {"ZeRO-1", "ZeRO-2"}
    sent = [{row["scheme"]: row for row in each["traffic"]}["ZeRO-2"] for each in found]
    others = found[0]["parameters"]["all"]["trained"] - experts
    # 8 passes, twice the share of the ring, bfloat16
    assert sent[1]["gradients"] == pytest.approx(8 * 2 * 2 * (7 / 8 * others + 1 / 2 * experts / 4))
    tokens = 8 * 6 * 32 * 160 * 2 * 4096 * 2 * 3 / 4  # passes, exchanges, layers, tokens, experts, numbers, bytes
    assert sent[1]["tokens"] == pytest.approx(tokens)
    assert sent[0]["tokens"] == 0


def test_paper_fast_takes_papers_steps_in_less() -> None:
    """As many rows a step, no more memory than a card of 80 GB has; by the plan a tenth of the time."""
    paper, fast = plan(load_config("paper"), 8, 80), plan(load_config("paper-fast"), 8, 80)
    assert paper["training"]["rows_per_step"] == fast["training"]["rows_per_step"] == 64
    assert paper["parameters"] == fast["parameters"]
    [own] = [row["plain"] for row in fast["memory"] if row["own"]]
    assert own["fits"]
    assert {row["scheme"] for row in fast["memory"]} == {
        "ZeRO-1", "ZeRO-2", "ZeRO-1, optimizer on host", "ZeRO-2, optimizer on host",
    }  # fmt: skip
    seconds = [sum(each["training"]["step_seconds"].values()) for each in (paper, fast)]
    assert 10 * seconds[1] < seconds[0]
    assert fast["training"]["checkpoints"] < 10 < paper["training"]["checkpoints"]
    # Weights of 2 bytes but for routers, slots, stage 1; a share of the float32 copies and moments.
    total = fast["parameters"]["all"]["total"]
    assert own["weights"] == pytest.approx(2 * total, rel=0.01)
    assert own["optimizer"] == pytest.approx(12 * total / 8)


def test_one_device_sends_nothing() -> None:
    blueprint = draw(tiny_config("llama", "random"), tiny_base("llama"), USERS, ITEMS)
    for stage in range(4):
        assert step_traffic(blueprint, Scheme(stage), 8, Shape(1, 20, 10), True).total == 0


def test_base_config_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    tiny_base("llama").save_pretrained(tmp_path)
    config = parse_config({"stage2": {"base_model": "some/model"}}, "test")
    assert base_shape(config.stage2, path).hidden_size == 64
    assert locate_base("some/model") == ("some/model", {})
