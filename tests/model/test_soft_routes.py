"""Gates beyond one a row: soft routes, gates that own experts, single and low-rank experts."""

import pytest
import torch
from helpers.moe_blocks import CLUSTERS, D, N, S, block, hidden, spec
from torch import Tensor, nn

from gavamoe.model.router import MultiGateRouter, check_cluster_ids, load_balance_loss


def responsibilities() -> Tensor:
    shares = torch.rand(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return shares / shares.sum(-1, keepdim=True)


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_soft_routes_mix_the_gates_probabilities(bias: float) -> None:
    built, states, share = block(gate_bias=bias), hidden(), responsibilities()
    logits, weights, experts = built.router(states, share)
    rows = [built.router(states, torch.full((4,), gate))[0] for gate in range(3)]
    mixed = sum(share[:, gate, None, None] * logits_of.softmax(-1) for gate, logits_of in enumerate(rows))
    torch.testing.assert_close(logits.softmax(-1), mixed)
    torch.testing.assert_close(weights, mixed.flatten(0, 1).topk(S, dim=-1).values)
    assert torch.equal(experts, mixed.flatten(0, 1).topk(S, dim=-1).indices)
    sums = sum(share[:, gate, None] * logits_of.logsumexp(-1) for gate, logits_of in enumerate(rows))
    torch.testing.assert_close(logits.logsumexp(-1), sums)


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_certain_responsibilities_are_hard_routes(bias: float) -> None:
    built, states = block(gate_bias=bias), hidden().requires_grad_()
    certain = nn.functional.one_hot(CLUSTERS, 3).double()
    torch.testing.assert_close(built(states, certain), built(states, CLUSTERS))
    built(states, certain).pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in built.parameters())


def test_soft_routes_train_every_gate_and_responsibilities_themselves() -> None:
    built, share = block(), responsibilities().requires_grad_()
    built(hidden(), share).pow(2).sum().backward()
    assert (built.router.weight.grad.abs().amax((1, 2)) > 0).all()
    assert share.grad is not None
    assert share.grad.abs().max() > 0
    balance = load_balance_loss(built.router(hidden(), share)[0], S, share, 3, None)
    assert 1 <= balance <= N / S


def test_gates_start_with_experts_of_their_own_and_may_borrow() -> None:
    router = MultiGateRouter(spec(experts=7, gates=3, gate_bias=2.0))
    owned = router.owned_KN()
    assert owned.tolist() == [[2, 0, 0, 2, 0, 0, 2], [0, 2, 0, 0, 2, 0, 0], [0, 0, 2, 0, 0, 2, 0]]
    with torch.no_grad():
        router.bias.copy_(owned)
        router.weight.zero_()
    _, _, experts = router(hidden().float(), CLUSTERS)
    for row, cluster in enumerate(CLUSTERS):
        assert (experts.view(4, 5, S)[row] % 3 == cluster).all()
    strong = 10 * nn.functional.one_hot(torch.tensor(1), 7)[:, None] * torch.ones(D)
    with torch.no_grad():
        router.weight[2] = strong
    _, _, borrowed = router(hidden().float().abs(), CLUSTERS)
    assert (borrowed.view(4, 5, S)[0, :, 0] == 1).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_renormalised_gates_learn_even_if_they_choose_a_single_expert(top_k: int) -> None:
    built = block(renormalize=True, top_k=top_k)
    _, weights, _ = built.router(hidden(), CLUSTERS)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64))
    built(hidden(), CLUSTERS).pow(2).sum().backward()
    assert built.router.weight.grad.abs().max() > 1e-3


def test_low_rank_experts_follow_their_definition() -> None:
    built, states = block(lora_rank=3, scale=2.0, renormalize=True), hidden()
    _, weights, experts = built.router(states, CLUSTERS)
    read, write = built.experts.read, built.experts.write
    for token, x in enumerate(states.flatten(0, 1)):
        expected = 2 * sum(w * write[e] @ (read @ x) for w, e in zip(weights[token], experts[token], strict=True))
        torch.testing.assert_close(built(states, CLUSTERS).flatten(0, 1)[token], expected)


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ([[0.5, 0.5, 0.5]] * 4, "add up to 1"),
        ([[1.5, -0.5, 0.0]] * 4, "at least 0"),
        ([[float("nan"), 0.5, 0.5]] * 4, "add up to 1"),
    ],
)
def test_responsibilities_that_are_no_shares_are_refused(shares: list[list[float]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_cluster_ids(torch.tensor(shares), 3)


def test_responsibilities_of_other_gates_or_rows_are_refused() -> None:
    for shape in ((4, 2), (3, 3)):
        with pytest.raises(ValueError, match=r"expected \(4, 3\), a share of each gate"):
            block()(hidden(), torch.full(shape, 0.5))
