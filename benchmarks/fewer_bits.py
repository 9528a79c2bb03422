"""What a run's texts lose by fewer bits: here, and as a GGUF file in llama.cpp, on the same test rows.

    python -m benchmarks.fewer_bits RUN [--rows 60] [--only float32,int8,q8_0]

Nats a token of the test rows' own explanations, their rating and features given, and the perplexity. float32, bfloat16,
int8, int4: gavamoe's own (`generation.dtype`, `--quantize`). f32, f16, q8_0, q4_0: the run's export, one file a gate,
in llama.cpp (`xllamacpp`, a development dependency), which is asked for the next token at each place of the text and
lists the likeliest ones; a token that is not among them counts as the last of the list, and how many did is said.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xllamacpp

from gavamoe.artifacts.run import open_run
from gavamoe.data.dataset import open_dataset
from gavamoe.evaluation.losses.measure import measure_row_losses
from gavamoe.evaluation.rows import EvaluatedRows, requests_of, select_rows
from gavamoe.export.exported_run import GGUF_TYPES, export_run
from gavamoe.generation.generator import ExplanationGenerator

OURS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "bits": "int8"},
    "int4": {"dtype": "float32", "bits": "int4"},
}
LISTED = 3000
"""Likeliest tokens that llama.cpp lists."""


class Loss(NamedTuple):
    """Of all rows together."""

    nats: float
    tokens: int
    unlisted: int = 0
    megabytes: float = 0.0
    """0: not known, since packed weights don't tell."""


def ours(run: Path, rows: EvaluatedRows, **options: Any) -> Loss:
    """By the explainer itself."""
    opened = open_run(run)
    explainer = ExplanationGenerator.load(opened.stage2, "cpu", **options)
    losses = measure_row_losses(explainer, open_dataset(opened.dataset), rows, seed=0)
    assert losses is not None
    size = 0 if "bits" in options else sum(parameter.nbytes for parameter in explainer.model.parameters())
    return Loss(float(losses.loss_N["shown"].sum()), int(losses.tokens_N.sum()), megabytes=size / 1e6)


def next_tokens(server: Any, ids: list[int]) -> tuple[dict[int, float], float]:
    """Log-probabilities of the likeliest tokens behind `ids`, and the lowest of them."""
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "logprobs": LISTED, "cache_prompt": True}
    answer = server.handle_completions(request)
    answer = answer[0] if isinstance(answer, list) else answer
    listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {entry["id"]: entry["logprob"] for entry in listed}
    return found, min(found.values())


def theirs(run: Path, rows: EvaluatedRows, kind: str, threads: int) -> Loss:
    """By llama.cpp, each row through its own gate's file."""
    explainer = ExplanationGenerator.load(open_run(run).stage2)
    filled = explainer.filler.fill(requests_of(rows, "given"))
    prompts, answers = explainer.prompts(filled), explainer.builder.answers(rows.references)
    nats, tokens, unlisted, size = 0.0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        export_run(open_run(run), out, "gguf", dtype=kind)
        models = json.loads((out / "prompt.json").read_text())["models"]
        for gate, (name, server) in enumerate(servers(out, models, threads)):
            size = (out / name).stat().st_size
            for row in [row for row, each in enumerate(filled) if each.cluster == gate]:
                for place, token in enumerate(answers[row]):
                    listed, lowest = next_tokens(server, [*prompts[row], *answers[row][:place]])
                    unlisted += token not in listed
                    nats -= listed.get(token, lowest)
                    tokens += 1
    return Loss(nats, tokens, unlisted, size / 1e6)


def servers(folder: Path, names: list[str], threads: int) -> Iterator[tuple[str, Any]]:
    """llama.cpp with each gate's file, one at a time."""
    for name in names:
        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity = str(folder / name), 0
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 512, 1, False, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        yield name, xllamacpp.Server(params)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--only", default=",".join([*OURS, *GGUF_TYPES]))
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = select_rows(open_dataset(open_run(asked.run).dataset), "test", asked.rows, seed=0)
    rows = rows.take(np.flatnonzero([bool(text.strip()) for text in rows.references]))
    print(f"{'type':10} {'nats a token':>12} {'perplexity':>10} {'unlisted':>9} {'MB a model':>10}", flush=True)
    for name in asked.only.split(","):
        found = ours(asked.run, rows, **OURS[name]) if name in OURS else theirs(asked.run, rows, name, asked.threads)
        mean = found.nats / found.tokens
        unlisted = f"{found.unlisted / found.tokens:9.2%}" if name in GGUF_TYPES else f"{'':9}"
        size = f"{found.megabytes:10.0f}" if found.megabytes else ""
        print(f"{name:10} {mean:12.4f} {math.exp(mean):10.2f} {unlisted} {size}", flush=True)


if __name__ == "__main__":
    main()
