"""The MoE block against Mixtral's, against dense networks, and against its own definition (Eq. 9-11)."""

import pytest
import torch
from helpers.moe_blocks import CLUSTERS, WIDTH, D, N, S, block, hidden, spec
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, MixtralConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from gavamoe.model import experts
from gavamoe.model.experts import FEW_TOKENS, has_wrong_gradients
from gavamoe.model.router import MultiGateRouter, check_cluster_ids, load_balance_loss, router_z_loss

KERNELS = ("eager", "batched_mm", "grouped_mm")


def gpt2_spec() -> dict[str, object]:
    return {"gated": False, "activation": "gelu_new"}


def test_block_follows_the_equations_token_by_token() -> None:
    built, states = block(), hidden()
    output = built(states, CLUSTERS)
    for row in range(4):
        gate = built.router.weight[CLUSTERS[row]]
        for position in range(5):
            x = states[row, position]
            values = (torch.exp(gate @ x) / torch.exp(gate @ x).sum()).tolist()
            kept = sorted(range(N), key=values.__getitem__)[-S:]
            expected = sum(values[expert] * built.experts.apply_expert(x[None], expert)[0] for expert in kept)
            torch.testing.assert_close(output[row, position], expected)


@pytest.mark.parametrize("name", KERNELS)
def test_one_gate_equals_mixtral_in_outputs_and_gradients(name: str) -> None:
    config = MixtralConfig(
        hidden_size=D, intermediate_size=WIDTH, num_local_experts=N, num_experts_per_tok=S, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    ours = block(name, gates=1, renormalize=True).float()
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight[0])
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
        theirs.experts.down_proj.copy_(ours.experts.down_proj)
    inputs = [hidden().float().requires_grad_(), hidden().float().requires_grad_()]
    outputs = [ours(inputs[0], None), theirs(inputs[1])]
    for output in outputs:
        output.pow(2).sum().backward()
    pairs = [
        (outputs[0], outputs[1]),
        (inputs[0].grad, inputs[1].grad),
        (ours.router.weight.grad[0], theirs.gate.weight.grad),
        (ours.experts.gate_up_proj.grad, theirs.experts.gate_up_proj.grad),
        (ours.experts.down_proj.grad, theirs.experts.down_proj.grad),
    ]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)  # values reach 100; float32 has 7 digits


def test_without_renormalising_the_output_is_smaller_by_the_dropped_gate_values() -> None:
    plain, renormalised = block(), block(renormalize=True)
    states = hidden()
    _, weights, _ = plain.router(states, CLUSTERS)
    scale = weights.sum(-1).view(4, 5, 1)
    assert scale.max() < 1
    torch.testing.assert_close(plain(states, CLUSTERS), renormalised(states, CLUSTERS) * scale)


def test_identical_gates_equal_one_gate() -> None:
    many, one = block(), block(gates=1)
    one.experts.load_state_dict(many.experts.state_dict())
    with torch.no_grad():
        many.router.weight.copy_(one.router.weight.expand_as(many.router.weight))
    torch.testing.assert_close(many(hidden(), CLUSTERS), one(hidden(), None))


def test_different_gates_route_differently() -> None:
    built, states = block(), hidden()[:1].expand(3, -1, -1)
    output = built(states, torch.tensor([0, 1, 2]))
    assert (output[0] - output[1]).abs().max() > 1e-3
    assert (output[1] - output[2]).abs().max() > 1e-3


def test_rows_do_not_see_each_other() -> None:
    built, states = block(), hidden()
    output = built(states, CLUSTERS)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(built(states[order], CLUSTERS[order]), output[order])
    for row in range(4):
        torch.testing.assert_close(built(states[row : row + 1], CLUSTERS[row : row + 1]), output[row : row + 1])


@pytest.mark.parametrize("changes", [{}, gpt2_spec()], ids=["swiglu", "gelu"])
@pytest.mark.parametrize(
    ("names", "dtype", "tolerance"),
    [(KERNELS[:2], torch.float64, 1e-12), (KERNELS, torch.float32, 1e-4)],  # torch's grouped_mm knows no float64
    ids=["float64", "float32"],
)
def test_kernels_agree(
    changes: dict[str, object], names: tuple[str, ...], dtype: torch.dtype, tolerance: float
) -> None:
    results = []
    for name in names:
        built, states = block(name, **changes).to(dtype), hidden().to(dtype).requires_grad_()
        output = built(states, CLUSTERS)
        output.pow(2).sum().backward()
        gradients = [parameter.grad for parameter in built.parameters()]
        results.append([output.detach(), states.grad, *gradients])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"gated": False, "activation": "gelu_new"}])
def test_auto_loops_over_the_chosen_experts_of_few_tokens(changes: dict[str, object]) -> None:
    states = hidden(rows=4, length=FEW_TOKENS).float()
    auto, eager, grouped = (block(name, **changes).float() for name in ("auto", "eager", "grouped_mm"))
    loops: list[int] = []
    loop = auto.experts.forward_few
    auto.experts.forward_few = lambda *arguments: loops.append(len(arguments[0])) or loop(*arguments)
    with torch.no_grad():
        for tokens in range(1, FEW_TOKENS + 1):
            row = states[:1, :tokens]
            torch.testing.assert_close(auto(row, CLUSTERS[:1]), eager(row, CLUSTERS[:1]), rtol=1e-4, atol=1e-4)
        assert loops == list(range(1, FEW_TOKENS + 1))
        assert torch.equal(auto(states, CLUSTERS), grouped(states, CLUSTERS))
    auto(states[:1, :1], CLUSTERS[:1]).sum().backward()  # with gradients every expert gets one
    assert len(loops) == FEW_TOKENS
    assert auto.experts.down_proj.grad is not None


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_experts_compute_in_autocast_s_data_type(name: str) -> None:
    built = block(name).float()
    seen: list[torch.dtype] = []
    built.experts.act_fn.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = built(hidden().float(), CLUSTERS)
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(output.float(), block("eager").float()(hidden().float(), CLUSTERS), rtol=0.1, atol=0.5)
    output.sum().backward()
    assert {parameter.grad.dtype for parameter in built.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", KERNELS)
def test_the_chosen_kernel_is_the_one_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    calls: list[str] = []
    for other in ("batched_mm", "grouped_mm"):
        original = moe.ALL_EXPERTS_FUNCTIONS[other]
        spy = lambda *args, other=other, original=original: calls.append(other) or original(*args)  # noqa: E731
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, other, spy)
    block(name).float()(hidden().float(), CLUSTERS)
    assert calls == ([] if name == "eager" else [name])


@pytest.mark.parametrize("name", KERNELS)
def test_an_expert_without_tokens_has_a_zero_gradient(name: str) -> None:
    built = block(name, experts=8).float()
    built(hidden(rows=1, length=1).float(), CLUSTERS[:1]).sum().backward()
    gradient = built.experts.down_proj.grad
    assert gradient is not None
    used = gradient.flatten(1).abs().sum(1) > 0
    assert int(used.sum()) == S


def test_slices_with_all_experts_active_equal_the_dense_llama_block() -> None:
    dense = LlamaMLP(LlamaConfig(hidden_size=D, num_attention_heads=2, intermediate_size=N * WIDTH)).double()
    built = block(top_k=N)
    built.experts.load_slices(dense)
    nn.init.zeros_(built.router.weight)
    torch.testing.assert_close(built(hidden(), CLUSTERS), dense(hidden()))


def test_slices_with_all_experts_active_equal_the_dense_gpt2_block() -> None:
    dense = GPT2MLP(N * WIDTH, GPT2Config(n_embd=D)).double().eval()
    nn.init.normal_(dense.c_proj.bias)
    nn.init.normal_(dense.c_fc.bias)
    built = block(top_k=N, **gpt2_spec())
    built.experts.load_slices(dense)
    nn.init.zeros_(built.router.weight)
    torch.testing.assert_close(built(hidden(), CLUSTERS), dense(hidden()))


def test_slices_renormalised_are_an_unbiased_estimate_of_the_dense_block() -> None:
    """Averaged over all pairs of experts, the top-2 output with weights 1/2 is the dense output."""
    dense = LlamaMLP(LlamaConfig(hidden_size=D, num_attention_heads=2, intermediate_size=N * WIDTH)).double()
    built = block()
    built.experts.load_slices(dense)
    states = hidden().flatten(0, 1)
    pairs = torch.combinations(torch.arange(N))
    halves = torch.full((len(states), 2), 0.5, dtype=torch.float64)
    outputs = [built.experts(states, pair.expand(len(states), 2), halves) for pair in pairs]
    torch.testing.assert_close(torch.stack(outputs).mean(0), dense(states))


def test_shared_expert_is_added_with_weight_one() -> None:
    dense = LlamaMLP(LlamaConfig(hidden_size=D, num_attention_heads=2, intermediate_size=N * WIDTH))
    built = block(shared=dense)
    routed = block()
    routed.load_state_dict({k: v for k, v in built.state_dict().items() if not k.startswith("shared")})
    torch.testing.assert_close(built(hidden(), CLUSTERS), routed(hidden(), CLUSTERS) + dense(hidden()))
    nn.init.zeros_(built.experts.down_proj)
    torch.testing.assert_close(built(hidden(), CLUSTERS), dense(hidden()), atol=0, rtol=0)


def test_router_computes_in_float32_for_bfloat16_states_and_under_autocast() -> None:
    router = MultiGateRouter(spec())
    nn.init.normal_(router.weight)
    states = hidden().to(torch.bfloat16)
    expected = torch.einsum("btd,bnd->btn", states.float(), router.weight[CLUSTERS])
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            logits, weights, _ = router(states, CLUSTERS)
        assert logits.dtype == weights.dtype == torch.float32
        torch.testing.assert_close(logits, expected)


def test_cluster_ids_are_required_and_checked() -> None:
    built = block()
    with pytest.raises(ValueError, match="cluster_ids: needed by a router with 3 gates"):
        built(hidden(), None)
    with pytest.raises(ValueError, match=r"cluster_ids: shape \(2,\); expected \(4,\)"):
        built(hidden(), torch.tensor([0, 1]))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        built(hidden(), torch.tensor([0, 1, -1, 2]))
    with pytest.raises(ValueError, match=r"cluster_ids: 3 is outside 0\.\.2"):
        check_cluster_ids(torch.tensor([0, 3]), gates=3)
    with pytest.raises(ValueError, match=r"cluster_ids: -1 is outside 0\.\.2"):
        check_cluster_ids(torch.tensor([0, -1]), gates=3)
    check_cluster_ids(torch.tensor([0, 2]), gates=3)


def one_sided_logits(favorites: list[list[int]]) -> Tensor:
    """Logits (B, T, N) in which each token strongly prefers one expert."""
    return 50.0 * nn.functional.one_hot(torch.tensor(favorites), N).float()


def test_load_balance_is_one_when_even_and_n_when_collapsed() -> None:
    even = one_sided_logits([[0, 1, 2, 3]])
    collapsed = one_sided_logits([[1, 1, 1, 1]])
    assert load_balance_loss(even, 1, None, 1, None).item() == pytest.approx(1.0)
    assert load_balance_loss(collapsed, 1, None, 1, None).item() == pytest.approx(N)


def test_load_balance_is_judged_gate_by_gate() -> None:
    """Two clusters with two experts each: even together, but each gate uses half of the experts."""
    logits = one_sided_logits([[0, 1, 0, 1], [2, 3, 2, 3]])
    clusters = torch.tensor([0, 2])
    assert load_balance_loss(logits, 1, clusters, 1, None).item() == pytest.approx(1.0)
    assert load_balance_loss(logits, 1, clusters, 3, None).item() == pytest.approx(2.0)


def test_auxiliary_losses_do_not_count_padding() -> None:
    logits = one_sided_logits([[1, 1, 0, 1], [0, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    clusters = torch.tensor([0, 1])
    kept = one_sided_logits([[0, 1]])
    expected = (load_balance_loss(kept, 1, None, 1, None) * 2 + 1.0 * 4) / 6
    torch.testing.assert_close(load_balance_loss(logits, 1, clusters, 2, mask), expected)
    noisy = torch.randn(2, 4, N, generator=torch.Generator().manual_seed(0))
    by_hand = (noisy.exp().sum(-1).log() ** 2)[mask.bool()].mean()
    torch.testing.assert_close(router_z_loss(noisy, mask), by_hand)
    assert (router_z_loss(noisy, None) - by_hand).abs() > 1e-3


def test_balance_loss_pulls_the_router_towards_even_use() -> None:
    router = MultiGateRouter(spec(gates=2))
    nn.init.normal_(router.weight, std=1.0, generator=torch.Generator().manual_seed(3))
    states, clusters = hidden(rows=2, length=64).float(), torch.tensor([0, 1])
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    values = []
    for _ in range(30):
        loss = load_balance_loss(router(states, clusters)[0], S, clusters, 2, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]
    assert values[-1] == pytest.approx(1.0, abs=0.1)


def test_experts_without_tokens_learn_nothing_where_grouped_products_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blackwell's give them gradients: training takes the loop there, writing does not."""
    for major, wrong in ((8, False), (9, False), (10, True), (12, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, major=major: (major, 0))
        assert has_wrong_gradients(torch.device("cuda:0")) is wrong
    assert not has_wrong_gradients(torch.device("cpu"))
    states = hidden(1, 3).float()
    auto, eager = (block(name).float() for name in ("auto", "eager"))
    monkeypatch.setattr(experts, "has_wrong_gradients", lambda _: True)
    monkeypatch.setattr(experts, "_grouped_for_training", lambda *_: pytest.fail("grouped"))
    outputs = [built(states, torch.tensor([1])) for built in (auto, eager)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(auto.parameters(), eager.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)
