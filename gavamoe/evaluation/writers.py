"""What an evaluation needs of a run, opened here or by Ray workers: a writer, its gates, the losses it reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gavamoe.artifacts.run import open_run
from gavamoe.config.schema import GenerationConfig, RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.evaluation.faithfulness.measure import Gates
from gavamoe.evaluation.losses.row_losses import RowLosses
from gavamoe.evaluation.rows import EvaluatedRows
from gavamoe.generation.batch.blocks import Writer
from gavamoe.model.quantized import Quantization

if TYPE_CHECKING:
    from gavamoe.evaluation.faithfulness.gates import GateProbe
    from gavamoe.generation.generator import Explanation
    from gavamoe.generation.request import ExplanationRequest
    from gavamoe.runtime.ray_pool import BlockPool

ReadLosses = Callable[[Dataset, EvaluatedRows, int], RowLosses | None]
"""Dataset, rows and seed -> the writer's losses; see `losses.measure`."""


@dataclass(frozen=True)
class Scored:
    """What is evaluated: a writer, and what else can be measured of it. Ray workers hold one each."""

    writer: Writer
    gates: Gates | None = None
    """Measures the writer's gates, if it has any."""
    losses: ReadLosses | None = None
    """Reads the rows' own texts, if the writer can."""

    def explain(
        self, requests: "Sequence[ExplanationRequest]", generation: GenerationConfig, seed: int = 0
    ) -> "list[Explanation]":
        """As the writer does."""
        return self.writer.explain(requests, generation, seed)

    def measure_gates(self, requests: "Sequence[ExplanationRequest]", references: Sequence[str]) -> "GateProbe | None":
        """What `gates` measures; None without gates."""
        return None if self.gates is None else self.gates(requests, references)

    def read_losses(self, dataset: Path, rows: EvaluatedRows, seed: int) -> RowLosses | None:
        """What `losses` reads of a dataset folder; None where the writer can't read."""
        return None if self.losses is None else self.losses(open_dataset(dataset), rows, seed)


def load_scored(run: Path, dtype: str, bits: Quantization, device: str) -> Scored:
    """A trained run's explainer on a torch device, with what can be measured of it."""
    from gavamoe.evaluation.faithfulness.gates import measure_gates
    from gavamoe.evaluation.losses.measure import measure_row_losses
    from gavamoe.generation.generator import ExplanationGenerator

    explainer = ExplanationGenerator.load(open_run(run).stage2, device, dtype, bits)
    return Scored(explainer, partial(measure_gates, explainer), partial(measure_row_losses, explainer))


@contextmanager
def open_writer(
    run: Path,
    config: RunConfig,
    device: str | None = None,
    workers: int | None = None,
    load: Callable[..., Scored] = load_scored,
) -> Iterator[tuple["Writer | BlockPool", Gates, ReadLosses | None]]:
    """What `load` opens of a run, here or on Ray workers, for `KeptTexts`; see `evaluate_run`."""
    from gavamoe.generation.placement import writing_device, writing_workers
    from gavamoe.runtime.ray_pool import BlockPool
    from gavamoe.runtime.ray_train import ray_session

    placement, generation = config.runtime, config.generation
    arguments = {"run": run, "dtype": generation.dtype, "bits": generation.quantize}
    count = writing_workers(placement, workers, device)
    if not count:
        here = load(**arguments, device=writing_device(device, gpu=placement.gpu))
        yield here.writer, here.measure_gates, here.losses
        return
    with ray_session(placement), BlockPool(load, arguments, workers=count, placement=placement) as pool:

        def losses(dataset: Dataset, rows: EvaluatedRows, seed: int) -> RowLosses | None:
            found: RowLosses | None = pool.call("read_losses", dataset.path.absolute(), rows, seed)
            return found

        yield pool, partial(pool.call, "measure_gates"), losses
