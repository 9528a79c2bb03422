"""Models, readers and columns of the baseline XRec for its tests."""

from pathlib import Path

import numpy as np
import torch

from gavamoe.baselines.frame import Columns, Reader
from gavamoe.baselines.xrec import Xrec
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.stage2.tokenized_rows import prompt_builder, rating_scale
from helpers.tiny import tiny


def config_of(*overrides: str, base: Path | None = None) -> RunConfig:
    own = () if base is None else (f"stage2.base_model={base}",)
    return tiny("system=xrec", "generation.max_new_tokens=6", "baselines.xrec.graph.epochs=2", *own, *overrides)


def reader_of(data: Dataset, config: RunConfig) -> Reader:
    return Reader(prompt_builder(config, data).tokenizer, config.stage2.prompt, rating_scale(data))


def xrec(data: Dataset, *overrides: str, base: Path | None = None, features: bool = False) -> Xrec:
    """A new model; a scratch one with weights so large that its texts depend on what it reads."""
    config = config_of(*overrides, base=base)
    torch.manual_seed(0)
    model = Xrec.create(config, data, reader_of(data, config), features=features).eval()
    for adapter in (model.users, model.items):
        torch.nn.init.normal_(adapter.weight)
        torch.nn.init.normal_(adapter.offset)
    for weight in model.lm.parameters() if base is None else ():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def columns_of(features: list[tuple[str, ...]], **changes: object) -> Columns:
    count = len(features)
    values = {
        "users": np.zeros(count, np.int64), "items": np.zeros(count, np.int64), "features": features,
        "ratings": np.full(count, np.nan, np.float32), "titles": [None] * count,
    }  # fmt: skip
    return Columns(**values | changes)  # type: ignore[arg-type]
