"""The loss of labeled tokens: in chunks of a large vocabulary it equals the plain one, and is never held whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.explainers import FAMILIES, VOCABULARY, dense_model, explainer, slot_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gavamoe.config.schema import LoraConfig
from gavamoe.model import output_head
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.lora import add_lora
from gavamoe.model.output_head import OutputHead, chunk_tokens

TOKENS, WIDTH, WORDS = 23, 16, 50


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the logits of some numbers of words stand at once."""
    return lambda count: monkeypatch.setattr(output_head, "CPU_LOGITS", count)


def head_and_tokens(dtype: torch.dtype = torch.float32) -> tuple[OutputHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = OutputHead(WIDTH, WORDS).to(dtype)
    nn.init.normal_(head.weight)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(WORDS, (TOKENS,))


def gradients(head: OutputHead, hidden: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Loss and gradients of `scale` times the loss."""
    loss = head(hidden, targets)
    wanted = [tensor for tensor in (hidden, head.weight) if tensor.requires_grad]
    return loss.detach(), *torch.autograd.grad(scale * loss, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 22])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_chunks_equal_the_whole(
    dtype: torch.dtype, tokens_at_once: int, trained: str, chunked: Callable[[int], None]
) -> None:
    head, hidden, targets = head_and_tokens(dtype)
    hidden.requires_grad_(trained != "weight")
    head.weight.requires_grad_(trained != "hidden")
    whole = gradients(head, hidden, targets, 0.3)
    by_hand = -functional.log_softmax(hidden @ head.weight.T, -1)[torch.arange(TOKENS), targets].sum()
    torch.testing.assert_close(whole[0], by_hand.detach())
    chunked(tokens_at_once * WORDS)
    parts = gradients(head, hidden, targets, 0.3)
    assert len(parts) == len(whole) == (3 if trained == "both" else 2)
    for part, expected in zip(parts, whole, strict=True):
        assert part.dtype == dtype
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_chunks_in_bfloat16_are_as_close_as_the_whole(autocast: bool, chunked: Callable[[int], None]) -> None:
    """Against float64 on the same numbers; autocast over float32 weights, or weights in bfloat16."""
    head, hidden, targets = head_and_tokens(torch.bfloat16)
    wide = OutputHead(WIDTH, WORDS).double()
    wide.weight.data.copy_(head.weight)
    true = gradients(wide, hidden.detach().double().requires_grad_(), targets, 0.3)
    if autocast:
        head, hidden = head.float(), hidden.detach().float().requires_grad_()
    errors = []
    for count in (10**6, 7 * WORDS):
        chunked(count)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            found = gradients(head, hidden, targets, 0.3)
        assert found[0].dtype == torch.float32
        assert [tensor.dtype for tensor in found[1:]] == [hidden.dtype, head.weight.dtype]
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True)])
    assert max(errors[0]) < 0.01
    assert max(errors[1]) < 0.01


def test_evaluation_makes_no_gradients(chunked: Callable[[int], None]) -> None:
    head, hidden, targets = head_and_tokens()
    expected = head(hidden, targets).detach()
    chunked(7 * WORDS)
    with torch.no_grad(), Largest() as largest:
        loss = head(hidden, targets)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad
    assert largest.numbers <= 7 * WORDS < WIDTH * WORDS


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shared = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in shared:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_logits_never_stand_whole(chunked: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    head, targets = OutputHead(4, 1000), torch.randint(1000, (200,))
    hidden = torch.randn(200, 4, requires_grad=True)
    for count, most in ((10**6, 200 * 1000), (20 * 1000, 20 * 1000)):
        chunked(count)
        with Largest() as largest:
            head(hidden, targets).backward()
        assert largest.numbers == most


def test_a_second_backward_pass_is_refused(chunked: Callable[[int], None]) -> None:
    head, hidden, targets = head_and_tokens()
    chunked(7 * WORDS)
    loss = head(hidden, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward pass"):
        loss.backward()


def test_at_least_one_token_at_a_time() -> None:
    assert chunk_tokens(1000, "cpu") * 1000 <= output_head.CPU_LOGITS < (chunk_tokens(1000, "cpu") + 1) * 1000
    assert chunk_tokens(10**9, "cpu") == chunk_tokens(10**9, "cuda") == 1
    assert chunk_tokens(128_256, "cuda") > 500


# In the explainer


def labeled_batch(model: GavamoeForCausalLM) -> dict[str, Tensor]:
    ids, mask, clusters = slot_batch(model)
    labels = ids.masked_fill(ids >= VOCABULARY, -100)
    labels[0, :4], labels[1, 5:] = -100, -100
    labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "cluster_ids": clusters, "labels": labels}


def trained(model: GavamoeForCausalLM, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor | None]:
    """The loss and all gradients."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, use_cache=False, **options)
    assert (output.logits is None) == (not options.get("return_logits", True))
    (0.7 * output.loss).backward()
    return {"loss": output.loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def check_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        if tensor is not None:
            torch.testing.assert_close(found[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_loss_without_logits_equals_that_with_logits(
    family: str, tied: bool, dtype: torch.dtype, checkpointing: bool, chunked: Callable[[int], None]
) -> None:
    model = explainer(dense_model(family, tied=tied).to(dtype), load_balance_weight=0.1)
    if checkpointing:
        model.train().activation_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    batch = labeled_batch(model)
    expected = trained(model, batch)
    assert all(tensor is not None and tensor.abs().max() > 0 for tensor in expected.values())
    for count in (10**9, 3 * VOCABULARY):
        chunked(count)
        check_equal(trained(model, batch, return_logits=False), expected)


@pytest.mark.parametrize("count", [10**9, 2 * VOCABULARY])
def test_positions_kept_and_number_of_items_mean_the_same(count: int, chunked: Callable[[int], None]) -> None:
    model = explainer()
    batch = labeled_batch(model)
    chunked(count)
    for options in ({"num_items_in_batch": 17}, {"logits_to_keep": 6}, {"logits_to_keep": torch.tensor([1, 4, 6])}):
        expected = trained(model, batch, **options)
        check_equal(trained(model, batch, return_logits=False, **options), expected)


@pytest.mark.parametrize("count", [10**9, 2 * VOCABULARY])
def test_a_frozen_base_model(count: int, chunked: Callable[[int], None]) -> None:
    model = explainer()
    add_lora(model, LoraConfig(rank=2), 0)
    batch = labeled_batch(model)
    expected = trained(model, batch)
    assert expected["model.embed_tokens.weight"] is None
    chunked(count)
    check_equal(trained(model, batch, return_logits=False), expected)


def test_without_any_label_gradients_are_zero_not_absent() -> None:
    model = explainer(dense_model(tied=False))
    batch = labeled_batch(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = trained(model, batch, return_logits=False)
    assert found.pop("loss") == 0.0
    assert all(tensor is not None and not tensor.any() for tensor in found.values())


def test_neither_labels_nor_logits_costs_no_head() -> None:
    model = explainer()
    batch = labeled_batch(model)
    del batch["labels"]
    output = model(**batch, return_logits=False)
    assert output.loss is None
    assert output.logits is None
