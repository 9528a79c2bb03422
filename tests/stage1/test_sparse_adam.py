"""The row-wise optimizer against torch's, and the exchange and clipping of sparse gradients."""

import torch

from gavamoe.stage1.sparse_adam import GradientSum, RowAdam, clip_gradients


def test_row_adam_equals_adamw_when_every_row_is_used() -> None:
    torch.manual_seed(0)
    sparse, dense = torch.nn.Embedding(6, 3, sparse=True), torch.nn.Embedding(6, 3)
    dense.weight.data.copy_(sparse.weight.data)
    ours = RowAdam([sparse.weight], lr=0.05, weight_decay=0.1)
    theirs = torch.optim.AdamW([dense.weight], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        rows = torch.cat([torch.arange(6), torch.randint(6, (4,))])
        target = torch.randn(10, 3)
        for table, optimizer in ((sparse, ours), (dense, theirs)):
            optimizer.zero_grad()
            (table(rows) - target).square().sum().backward()
        GradientSum([], [sparse.weight])([10])
        ours.step()
        theirs.step()
        torch.testing.assert_close(sparse.weight, dense.weight)


def test_row_adam_leaves_unused_rows_alone() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = RowAdam([table.weight], lr=0.1, weight_decay=0.5)
    table(torch.tensor([1, 3, 3])).sum().backward()
    GradientSum([], [table.weight])([3])
    optimizer.step()
    changed = (table.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, True, False]


def test_clipping_equals_torchs_over_dense_and_rows() -> None:
    torch.manual_seed(0)
    linear, sparse, dense = torch.nn.Linear(3, 1), torch.nn.Embedding(6, 3, sparse=True), torch.nn.Embedding(6, 3)
    dense.weight.data.copy_(sparse.weight.data)
    rows = torch.tensor([0, 2, 2, 5])
    gradients = []
    for table in (sparse, dense):
        linear.zero_grad()
        (linear(table(rows)) * 10).square().sum().backward()
        if table is sparse:
            GradientSum(list(linear.parameters()), [sparse.weight])([4])
            norm = clip_gradients(list(linear.parameters()), [sparse.weight], 0.5)
        else:
            expected = torch.nn.utils.clip_grad_norm_([*linear.parameters(), dense.weight], 0.5)
        assert linear.weight.grad is not None
        gradients.append(linear.weight.grad.clone())
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(*gradients)
    assert sparse.weight.grad is not None
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
