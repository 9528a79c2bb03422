"""`gavamoe export`: the whole of an exported run.

    OUT/gate-K/ or gate-K.gguf   one model a gate (model/ or model.gguf where there is one for all pairs)
    OUT/tokenizer/               with GGUF: the tokenizer, for clients that send token ids
    OUT/prompt.json              the prompt's pieces, and which model is which gate's
    OUT/routes.parquet           pairs of the dataset: user, item, gate, predicted rating
    OUT/users.parquet            user, token, and gate and rating for pairs that are in no route
    OUT/items.parquet            item, token, title, usual features
    OUT/client.py, README.md     how to ask for a text

Inputs: a run folder, whose dataset is not opened. It is written whole or not at all.
"""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig, PreTrainedModel

from gavamoe.artifacts.files import versions, write_folder, write_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.artifacts.run import Run
from gavamoe.errors import InputError
from gavamoe.export.plain_model import check_exportable, plain_model
from gavamoe.export.slot_tokens import SlotRows, add_names, slot_names, slot_rows
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.prompts import PromptBuilder, PromptSpec
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.base_model import special_ids
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.runtime.progress import NoProgress, Progress
from gavamoe.stage1.routes import ROUTES_FILE

Format = Literal["hf", "gguf"]
HF_TYPES = ("float32", "float16", "bfloat16")
GGUF_TYPES = ("f32", "f16", "q8_0", "q4_0")
_PROBES = 16
"""Prompts by which the least likely token is found."""
_CLIENT = Path(__file__).with_name("client.py.txt")


@dataclass(frozen=True)
class _Routes:
    """Gates and predicted ratings of P pairs."""

    users: np.ndarray
    items: np.ndarray
    gates: np.ndarray
    """(P,) int64, all 0 where one gate serves all."""
    ratings: np.ndarray


def export_run(
    run: Run,
    out: Path,
    form: Format = "hf",
    *,
    gate: int | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write a run's explainer as plain models; returns their names in `out`.

    Args:
        gate: the gate of the one model that is written, which then serves all pairs; None: one model for each gate.
        dtype: one of HF_TYPES (None: float32) or of GGUF_TYPES (None: q8_0).

    Raises:
        InputError: `out` exists, an unknown type, a gate that the run doesn't have, or an explainer that no public
            architecture holds.
    """
    progress = progress or NoProgress()
    known = HF_TYPES if form == "hf" else GGUF_TYPES
    dtype = dtype or {"hf": "float32", "gguf": "q8_0"}[form]
    if dtype not in known:
        raise InputError(f"export: --dtype {dtype} is none of --format {form}'s: {', '.join(known)}")
    if form == "gguf" and find_spec("gguf") is None:
        raise InputError("export: --format gguf needs the package gguf; pip install 'gavamoe[gguf]'")
    run.refuse_baseline("only explainers are exported")
    if not run.stage2.is_dir():
        raise InputError(
            f"{run.path}: has no stage 2 yet, which is what is exported; `gavamoe train --resume` makes it"
        )
    read_manifest(run.stage2, "stage2")
    gates = _gates(GavamoeConfig.from_pretrained(run.stage2), gate)
    with write_folder(out) as aside:
        progress.step("Read the explainer")
        generator = ExplanationGenerator.load(run.stage2, "cpu", "float32")
        if generator.spec.prompt.quotes:
            raise InputError("export: prompts that quote training texts can't be built without gavamoe;"
                             " train with stage2.prompt.quotes=0")  # fmt: skip
        routes = _routes(run, generator)
        slots = _slots(generator, routes)
        names = _models(generator, slots, gates, aside, form, dtype, progress)
        progress.step("Write routes, users, items and the client")
        _write_tables(generator, routes, aside)
        described = _prompt(generator, routes, slots, names, form) | {
            "made_from": read_manifest(run.stage2, "stage2", verify=False).fingerprint,
            "versions": versions(),
            "max_new_tokens": run.config.generation.max_new_tokens,
        }
        write_json(aside / "prompt.json", described)
        shutil.copyfile(_CLIENT, aside / "client.py")
        (aside / "README.md").write_text(_readme(names, form, dtype, generator), encoding="utf-8")
    return sorted(set(names))


def _gates(config: GavamoeConfig, gate: int | None) -> list[int]:
    """The gate whose model serves each of the K clusters."""
    check_exportable(config)
    count = config.n_gates if config.experts_enabled else 1
    if gate is not None and not 0 <= gate < count:
        have = f"gates 0 to {count - 1}" if count > 1 else "one gate, 0"
        raise InputError(f"export: gate {gate}: this run has {have}")
    return list(range(count)) if gate is None else [gate] * count


def _routes(run: Run, generator: ExplanationGenerator) -> _Routes:
    """Routes of the dataset's pairs, which stage 1 keeps; by the run's rule where one routes in stage 1's place."""
    filler, config = generator.filler, generator.model.config
    table = pq.read_table(run.stage1 / ROUTES_FILE, columns=["user", "item", "cluster", "predicted_rating"])
    users, items, clusters, ratings = (column.to_numpy() for column in table.columns)
    if filler.control is not None:
        clusters = filler.routes(users.astype(np.int64), items.astype(np.int64)).cluster
    several = config.n_cluster_slots > 1 or (config.experts_enabled and config.n_gates > 1)
    return _Routes(users, items, clusters.astype(np.int64) * several, ratings)


def _slots(generator: ExplanationGenerator, routes: _Routes) -> SlotRows:
    step = max(1, len(routes.users) // _PROBES)
    pairs = list(zip(routes.users[::step].tolist(), routes.items[::step].tolist(), strict=True))[:_PROBES]
    if not pairs:
        pairs = [(generator.catalog.known_users, generator.catalog.known_items)]
    prepared = generator.prepare([ExplanationRequest(user, item) for user, item in pairs])
    return slot_rows(generator.model, prepared.prompts, generator.cluster_ids(prepared.requests))


def _models(
    generator: ExplanationGenerator,
    slots: SlotRows,
    gates: list[int],
    out: Path,
    form: Format,
    dtype: str,
    progress: Progress,
) -> list[str]:
    """Write the models; returns the name of the one that serves each gate's pairs."""
    model, tokenizer = generator.model, generator.tokenizer
    forbidden = sorted((special_ids(tokenizer) - {generator.builder.end}) | set(range(slots.vocabulary, slots.size)))
    config = model.config
    add_names(tokenizer, slots.vocabulary, list(slot_names(generator.catalog, config)))
    names = [f"gate-{gate}" if len(gates) > 1 else "model" for gate in gates]
    if form == "gguf":
        names = [f"{name}.gguf" for name in names]
        tokenizer.save_pretrained(out / "tokenizer")
    for done, (name, gate) in enumerate(dict(zip(names, gates, strict=True)).items(), start=1):
        progress.step(f"Write {name} [{done}/{len(set(names))}]")
        plain = plain_model(model, gate, slots)
        if form == "gguf":
            from gavamoe.export.gguf_file import write_gguf

            kind: Any = dtype
            write_gguf(out / name, plain, tokenizer, kind, name=f"gavamoe {Path(name).stem}")
            continue
        plain.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=generator.builder.end,
            pad_token_id=generator.builder.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            max_new_tokens=generator.spec.prompt.max_explanation_tokens,
            suppress_tokens=forbidden,
        )
        _in_type(plain, dtype).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    return names


def _in_type(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    wanted: torch.dtype = getattr(torch, dtype)
    return model.to(wanted)


def _write_tables(generator: ExplanationGenerator, routes: _Routes, out: Path) -> None:
    catalog, model, spec = generator.catalog, generator.model, generator.spec
    rated = spec.scale is not None

    def ids(indices: np.ndarray, name_of: Any) -> pa.Array:
        return pa.DictionaryArray.from_arrays(
            pa.array(np.unique(indices, return_inverse=True)[1], pa.int32()),
            pa.array([name_of(int(index)) for index in np.unique(indices)], pa.string()),
        ).cast(pa.string())

    def column(values: np.ndarray) -> pa.Array:
        return pa.array(values if rated else [None] * len(values), pa.float32())

    columns = {
        "user": ids(routes.users, catalog.user_id),
        "item": ids(routes.items, catalog.item_id),
        "gate": pa.array(routes.gates, pa.int16()),
        "rating": column(_shown(routes.ratings, spec)),
    }
    pq.write_table(pa.table(columns), out / "routes.parquet")
    users = np.arange(model.config.n_users)
    gates, ratings = _usual(routes, len(users))
    columns = {
        "user": pa.array([catalog.user_id(index) for index in users.tolist()], pa.string()),
        "token": pa.array(users + model.slots.vocabulary, pa.int32()),
        "gate": pa.array(gates, pa.int16()),
        "rating": column(_shown(ratings, spec)),
    }
    pq.write_table(pa.table(columns), out / "users.parquet")
    items = range(model.config.n_items)
    usual = [catalog.usual_features(catalog.n_users, index, spec.usual_features) for index in items]
    columns = {
        "item": pa.array([catalog.item_id(index) for index in items], pa.string()),
        "token": pa.array(np.arange(len(items)) + model.slots.first_item, pa.int32()),
        "title": pa.array([catalog.item_title(index) for index in items], pa.string()),
        "features": pa.array([list(words) for words in usual], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(columns), out / "items.parquet")


def _shown(ratings: np.ndarray, spec: PromptSpec) -> np.ndarray:
    """Predicted ratings as prompts have them: the scale's nearest, or with soft ratings as they are."""
    scale = spec.scale
    if scale is None or spec.prompt.soft_rating:
        return ratings
    distinct, place = np.unique(ratings, return_inverse=True)
    return np.array([scale.nearest(float(value)) for value in distinct], dtype=np.float32)[place]


def _usual(routes: _Routes, users: int) -> tuple[np.ndarray, np.ndarray]:
    """The commonest gate and the mean predicted rating of each user's pairs; of all pairs for users without any."""
    known = routes.users < users
    count_UK = np.zeros((users, int(routes.gates.max(initial=0)) + 1), np.int64)
    np.add.at(count_UK, (routes.users[known], routes.gates[known]), 1)
    total_U = np.bincount(routes.users[known], weights=routes.ratings[known], minlength=users)
    pairs_U = count_UK.sum(1)
    overall = float(routes.ratings.mean()) if len(routes.ratings) else 0.0
    gates_U = np.where(pairs_U > 0, count_UK.argmax(1), count_UK.sum(0).argmax())
    return gates_U, np.where(pairs_U > 0, total_U / np.maximum(pairs_U, 1), overall)


def _prompt(
    generator: ExplanationGenerator, routes: _Routes, slots: SlotRows, names: list[str], form: Format
) -> dict[str, Any]:
    model, spec = generator.model, generator.spec
    scale, ids = spec.scale, model.slots
    mean = float(routes.ratings.mean()) if len(routes.ratings) else 0.0
    return PromptBuilder(generator.tokenizer, ids, spec.prompt, scale).pieces() | {
        "format": form,
        "models": names if len(names) > 1 else names * max(1, model.config.n_cluster_slots),
        "gate": int(np.bincount(routes.gates).argmax()) if len(routes.gates) else 0,
        "rating": None if scale is None else float(_shown(np.array([mean]), spec)[0]),
        "unknown_user": ids.unknown_user,
        "unknown_item": ids.unknown_item,
        "clusters": list(range(ids.cluster, slots.size)),
        "middle": None if scale is None else scale.middle,
        "neutral_within": None if scale is None else scale.neutral_within,
    }


def _readme(names: list[str], form: Format, dtype: str, generator: ExplanationGenerator) -> str:
    several = len(set(names)) > 1
    which = "the gate of a pair is in routes.parquet; client.py looks it up" if several else "one model for all pairs"
    use = {
        "hf": "`python client.py USER ITEM [RATING] [FEATURE,...]` writes a text with transformers.",
        "gguf": "`python client.py USER ITEM [RATING] [FEATURE,...]` prints a request for llama.cpp's server:\n\n"
        f"    llama-server -m {sorted(set(names))[0]} --port 8080\n"
        "    python client.py USER ITEM | curl -s http://127.0.0.1:8080/completion -d @-",
    }[form]
    settings = generator.spec.prompt
    return (
        f"# An exported explainer\n\nModels ({dtype}): {', '.join(sorted(set(names)))}; {which}.\n\n{use}\n\n"
        "Users and items are tokens such as `<user:U17>` and `<item:I3>`; `<user>` and `<item>` stand for all others.\n"
        "They are never written. `prompt.json` has the prompt's pieces: each is tokenized by itself, without special\n"
        f"tokens, and prompts have at most {settings.max_tokens} tokens.\n"
    )
