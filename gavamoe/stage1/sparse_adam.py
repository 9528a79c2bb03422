"""Sparse AdamW for embedding tables, which updates only the rows that a batch used, and the exchange of gradients.

A dense optimizer step over 47,413 rows of 768 reads and writes a gigabyte, as much time as the whole
backward pass on a CPU; a batch of 1,024 pairs uses at most 2,048 of these rows. A row that is not used
keeps value and moments (no decay of momentum between its uses), and its own count of steps
corrects the bias of its moments.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RowAdam(torch.optim.Optimizer):
    """AdamW over the used rows of tables whose gradients are sparse (`nn.Embedding(..., sparse=True)`).

    Weight decay is decoupled and applies to a row when it is used.
    """

    def __init__(
        self,
        tables: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(list(tables), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        """Update the rows that have gradients; these must be coalesced."""
        del closure
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, table.grad, group)

    def _update(self, table: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[table]
        if not state:
            state["steps"] = torch.zeros(len(table), device=table.device)
            state["first"] = torch.zeros_like(table)
            state["second"] = torch.zeros_like(table)
        rows_R, grad_RE = grad.indices()[0], grad.values()
        beta1, beta2 = group["betas"]
        steps_R1 = (state["steps"][rows_R] + 1).unsqueeze(1)
        first_RE = state["first"][rows_R].lerp_(grad_RE, 1 - beta1)
        second_RE = state["second"][rows_R].mul_(beta2).addcmul_(grad_RE, grad_RE, value=1 - beta2)
        state["steps"][rows_R] = steps_R1.squeeze(1)
        state["first"][rows_R] = first_RE
        state["second"][rows_R] = second_RE
        scale_RE = (second_RE / (1 - beta2**steps_R1)).sqrt_().add_(group["eps"])
        change_RE = first_RE / (1 - beta1**steps_R1) / scale_RE
        kept_RE = table[rows_R] * (1 - group["lr"] * group["weight_decay"])
        table[rows_R] = kept_RE - group["lr"] * change_RE


class GradientSum:
    """Replaces every worker's gradients by their sum over the workers, and coalesces those of the tables.

    Args:
        dense: parameters with ordinary gradients; one without counts as zero.
        tables: embedding tables looked up in batch order.
        lookups: rows of each table that one row of the batch reads; none given: one of each.
    """

    def __init__(self, dense: Sequence[Tensor], tables: Sequence[Tensor], lookups: Sequence[int] = ()) -> None:
        self._dense, self._tables = dense, tables
        self._lookups = lookups or [1] * len(tables)
        self._flat = dense[0].new_empty(0) if dense else torch.empty(0)
        """Buffer of all dense gradients, kept between steps: to allocate it anew costs as much as the exchange."""

    def __call__(self, counts: Sequence[int]) -> None:
        """Sum up; `counts` are the batch's rows on each worker, and a single worker needs no process group."""
        work = self._start_dense() if len(counts) > 1 else None
        for table, lookups in zip(self._tables, self._lookups, strict=True):
            grad = table.grad
            if grad is None:
                continue
            if len(counts) > 1:
                of_workers = [lookups * count for count in counts]
                rows, values = _gather_rows(grad._indices()[0], grad._values(), of_workers)
                grad = torch.sparse_coo_tensor(rows.unsqueeze(0), values, grad.shape, check_invariants=False)
            table.grad = grad.coalesce()
        if work is not None:
            work.wait()
            sums = self._flat.split([parameter.numel() for parameter in self._dense])
            for parameter, total in zip(self._dense, sums, strict=True):
                parameter.grad = total.view_as(parameter)

    def _start_dense(self) -> dist.Work:
        """Begin to sum the dense gradients, in the background of the exchange of rows."""
        gradients = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self._dense]
        self._flat.resize_(sum(gradient.numel() for gradient in gradients))
        torch.cat(gradients, out=self._flat)
        return dist.all_reduce(self._flat, async_op=True)


def clip_gradients(
    dense: Sequence[Tensor],
    tables: Sequence[Tensor],
    limit: float,
    over_workers: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norm before.

    Args:
        over_workers: sums over the workers, each of which has the tables' gradients of some rows alone.
    """
    gradients = [p.grad for p in dense if p.grad is not None]
    of_rows = [t.grad.values() for t in tables if t.grad is not None]
    norms = [torch.linalg.vector_norm(grad) for grad in (*gradients, *of_rows)]
    if over_workers is not None:
        row_norms = over_workers(torch.stack(norms[len(gradients) :]).square()).sqrt()
        norms[len(gradients) :] = row_norms.unbind()
    gradients += of_rows
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if norm > limit:
        torch._foreach_mul_(gradients, float(limit / norm))
    return norm


def _gather_rows(rows_B: Tensor, values_BE: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """All workers' rows and values in worker order: the order in which one worker would have them."""
    return _gather(rows_B, counts), _gather(values_BE, counts)


def _gather(local: Tensor, counts: Sequence[int]) -> Tensor:
    """The workers' tensors, one after the other; gloo exchanges equal shapes only, so shorter ones are padded."""
    longest = max(counts)
    if len(local) < longest:
        local = torch.cat([local, local.new_zeros(longest - len(local), *local.shape[1:])])
    gathered = local.new_empty(len(counts), *local.shape)
    dist.all_gather(list(gathered), local)
    if min(counts) == longest:
        return gathered.flatten(0, 1)
    return torch.cat([gathered[worker, :count] for worker, count in enumerate(counts)])
