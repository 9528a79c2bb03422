"""Stage 1's part of a plan: memory, traffic and time by where the embeddings are (`stage1.tables`).

Shape letters: U users, I items, E embedding size, K clusters, W devices, B pairs of a step on all devices.
"""

from dataclasses import asdict, dataclass
from typing import Any, get_args

from gavamoe.config.schema import RunConfig, Stage1Config
from gavamoe.model.tables.embedding import EmbeddingTable
from gavamoe.model.tables.hashed import HashedTable
from gavamoe.plan.memory import FLOAT, LONG, USABLE
from gavamoe.plan.parameters import draw_stage1
from gavamoe.plan.work import FLOAT32_SHARE, pair_cost
from gavamoe.stage1.spectral_init import MAX_COMPONENTS, OVERSAMPLES

PAIR_BYTES = 36
"""Bytes of host memory for each stage-1 training pair: 12 for its columns, held as read, in the epoch's order, and
while shuffled."""
_THIN_COPIES = 3
"""Matrices of U rows that stand at once while rank 0 computes the spectral start."""
KINDS: tuple[str, ...] = get_args(Stage1Config.model_fields["tables"].annotation)


@dataclass(frozen=True)
class Workload:
    """The sizes of the training data."""

    users: int
    """Known users."""
    items: int
    """Known items."""
    rows: int
    """Rows of the training split."""
    prompt_tokens: float
    """Mean number of tokens of a prompt."""
    answer_tokens: float
    """Mean number of tokens of an explanation."""


@dataclass(frozen=True)
class Hardware:
    """The devices that a plan is made for."""

    devices: int
    """W: number of devices, each with one worker."""
    memory: float
    """Memory of one device in bytes."""
    flops: float
    """Peak arithmetic of one device in bf16, in FLOP/s."""
    utilization: float
    """Share of that peak that matrix products reach."""
    bandwidth: float
    """Bytes per second that one device can send."""
    memory_bandwidth: float = 2e12
    """Bytes per second that one device's own memory moves: 2 TB/s on an A100 of 80 GB, 3 measured on an H100."""


@dataclass(frozen=True)
class TableMemory:
    """Bytes of stage 1's states with one kind of tables."""

    tables: int
    """Numbers in the tables of users and items, on all devices together where they are sharded."""
    weights: float
    """Bytes of the weights that a device holds."""
    gradients: float
    """Bytes of the gradients, and of the vectors fetched for a step, on a device."""
    optimizer: float
    """Bytes of the moments on a device."""
    best: float
    """Bytes of the best state on a device."""
    activations: float
    """Bytes kept from the forward for the backward pass."""
    users: float
    """Bytes in each worker's host memory: q(c|u) and its evidence."""
    start: float
    """Bytes in rank 0's host memory while it computes the spectral start; then they are gone."""
    files: float
    """Bytes of the best state's rows among a worker's temporary files; 0 where it is in memory."""
    sent: float
    """Bytes that a device sends per step."""

    @property
    def device(self) -> float:
        """Bytes on a device."""
        return self.weights + self.gradients + self.optimizer + self.best + self.activations


def table_memory(config: Stage1Config, users: int, items: int, rows: int, devices: int) -> TableMemory:
    """The memory of the config's kind of tables.

    Args:
        rows: training pairs; a step has no more.
    """
    model = draw_stage1(config, users, items)
    tables = [each for each in (model.user_embedding, model.item_embedding) if isinstance(each, EmbeddingTable)]
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith(("user_emb", "item_emb"))}
    dense = sum(parameter.numel() for parameter in parameters.values())
    trained = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    size, batch = config.embedding_size, min(config.batch_size, rows)
    ids = [each.rows if isinstance(each, HashedTable) else each.ids for each in tables]
    table_rows = sum(ids) + len(ids)
    sharded = config.tables == "sharded"
    held = table_rows / devices if sharded else table_rows  # rows on a device
    ring = (devices - 1) / devices
    if sharded:
        # Fetched vectors, their gradients, and those that arrive for a device's own rows.
        moved = 3 * len(tables) * batch / devices * size
        row_bytes = len(tables) * batch / devices * 2 * (FLOAT * size + LONG)
    else:
        lookups = sum(each.lookups for each in tables)
        moved = min(lookups * batch, table_rows) * size
        row_bytes = lookups * batch * (FLOAT * size + LONG)
    thin = min(MAX_COMPONENTS, size - 1) + 1 + OVERSAMPLES
    return TableMemory(
        tables=table_rows * size,
        weights=FLOAT * (dense + held * size),
        gradients=FLOAT * (trained + moved),
        optimizer=FLOAT * (2 * (trained + held * size) + held),  # and each row's number of steps
        best=FLOAT * (dense + (0 if sharded else held * size)),
        activations=batch / devices * pair_cost(config).activations,
        users=(FLOAT + 2 * FLOAT) * config.clusters * (users + 1) if config.user_agreement else 0.0,
        start=_THIN_COPIES * 2 * FLOAT * thin * max(users, items) if config.embedding_init == "spectral" else 0.0,
        files=FLOAT * held * size if sharded else 0.0,
        sent=ring * (2 * FLOAT * trained + row_bytes),
    )


def plan_stage1(config: RunConfig, workload: Workload, hardware: Hardware) -> dict[str, Any]:
    """Stage 1's numbers: those of the config's own tables, and memory and traffic of all three kinds."""
    stage1 = config.stage1
    of_kinds = {
        kind: table_memory(
            stage1.model_copy(update={"tables": kind}), workload.users, workload.items, workload.rows, hardware.devices
        )
        for kind in KINDS
    }
    own = of_kinds[stage1.tables]
    parameters = sum(p.numel() for p in draw_stage1(stage1, workload.users, workload.items).parameters())
    if stage1.tables == "sharded":  # whose rows are no parameters of the model that is read
        parameters += own.tables
    epochs = stage1.pretrain_epochs + stage1.epochs
    steps = -(-workload.rows // stage1.batch_size)
    flops = workload.rows * pair_cost(stage1).flops
    rate = hardware.devices * hardware.flops * FLOAT32_SHARE * hardware.utilization
    names = ("weights", "gradients", "optimizer", "best", "activations", "device")
    return {
        "parameters": {"all": parameters, "tables": own.tables},
        "memory": {name: getattr(own, name) for name in names}
        | {"host": PAIR_BYTES * workload.rows, "users": own.users, "start": own.start},
        "tables": stage1.tables,
        "kinds": {
            kind: asdict(memory) | {"device": memory.device, "fits": memory.device <= USABLE * hardware.memory}
            for kind, memory in of_kinds.items()
        },
        "fits": own.device <= USABLE * hardware.memory,
        "steps_per_epoch": steps,
        "epochs": epochs,
        "flops_per_epoch": flops,
        "traffic_per_step": own.sent,
        "seconds": {"compute": epochs * flops / rate, "communication": epochs * steps * own.sent / hardware.bandwidth},
    }
