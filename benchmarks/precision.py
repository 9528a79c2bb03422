"""What a micro-batch does under each `stage2.precision`: operations, bytes of casts, bytes sent by two workers.

    python -m benchmarks.precision [--no-workers]

The model of `benchmarks.plan` (47 million parameters with experts), 2 rows of 96 tokens, joint loss, recomputation, on
a CPU. Operations are those that torch's dispatcher carries out in a forward and a backward pass, views left out; a cast
is `aten::_to_copy` into another type, counted by what it reads and what it writes. Counts depend on no clock.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plan import BASE, _batch, _model, measure, planned, run_config

PRECISIONS = ("fp32", "bf16", "bf16_weights")
_VIEWS = ("view", "_unsafe_view", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "permute",
          "detach", "alias", "split", "chunk", "unbind", "as_strided")  # fmt: skip
"""Operations that only make another view: nothing is read or launched."""


class Counts(TorchDispatchMode):
    """Counts operations by name, and the bytes that casts read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.cast_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name == "_to_copy" and found.dtype != args[0].dtype:
            self.cast_bytes += args[0].nbytes + found.nbytes
        return found

    @property
    def launched(self) -> int:
        """Operations but for views."""
        return sum(count for name, count in self.calls.items() if name not in _VIEWS)


def count(precision: str, **stage2: Any) -> Counts:
    """The counts of one micro-batch, forward and backward."""
    config = run_config(
        precision=precision, zero_stage=2, batch_size=2, gradient_accumulation=1, gradient_checkpointing=True, **stage2
    )
    model = _model(config, BASE).train()
    batch = _batch(config, BASE)
    counts = Counts()
    with counts:
        model(**batch)["loss"].backward()
    return counts


def main() -> None:
    """Print a line a precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-workers", action="store_true", help="leave out what two workers send")
    arguments = parser.parse_args()
    for precision in PRECISIONS:
        counts = count(precision)
        line = (
            f"{precision:13} {counts.launched:6,} operations, {counts.calls['_to_copy']:5,} copies,"
            f" {counts.cast_bytes / 1e6:8,.1f} MB read and written by casts"
        )
        if not arguments.no_workers:
            config = run_config(precision=precision, zero_stage=2, batch_size=2, gradient_accumulation=1)
            sent, ours = measure(config, 2)["sent"], planned(config, 2)["sent"]
            line += f"; two workers at ZeRO-2 send {sent / 1e6:7,.1f} MB a step, plan {ours / sent:.3f} x"
        print(line, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
