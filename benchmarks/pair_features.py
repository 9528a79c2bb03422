"""Features for pairs that name none: do held-out reviews name them, and what do they give the texts?

    python -m benchmarks.pair_features RUN... [--texts 500] [--split test] [--json]

Of the rows with features whose item is known: recall and precision at 3 of `PairFeatures`, of the item's usual features
(those that the user uses too first: what was asked for before), of the item's most frequent ones, and of the most
frequent ones of all. With --texts, so many rows are written for under the predicted protocol, once with the usual and
once with the ranked features, by the same model.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.artifacts.run import Run, open_run
from gavamoe.config.files import override_config
from gavamoe.data.dataset import Dataset, dataset_of_run
from gavamoe.evaluation.evaluate import evaluate
from gavamoe.generation.evidence.pair_features import PairFeatures
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.routes import ROUTES_FILE, route_pairs, training_routes

AT = 3
Chooser = Callable[[int, int, Sequence[float]], Sequence[str]]


def choosers(data: Dataset, ranked: PairFeatures) -> dict[str, Chooser]:
    """Ways to choose features, by name."""
    catalog, frequent = data.catalog, ranked.names[:AT]

    def of_item(item: int) -> Sequence[str]:
        counts = np.asarray(ranked.item_IF[item].todense()).ravel()
        return [ranked.names[at] for at in np.argsort(-counts, kind="stable")[:AT] if counts[at]]

    return {
        "ranked": lambda user, item, q_K: ranked.rank(user, item, q_K, AT),
        "usual": lambda user, item, _: catalog.usual_features(user, item, AT),
        "the item's most frequent": lambda _, item, __: of_item(item),
        "most frequent": lambda *_: frequent,
    }


def measure(run: Run, split: str, texts: int) -> dict[str, Any]:
    """Recall and precision of each chooser, in percent, and scores of the texts."""
    data, stage = dataset_of_run(run), run.stage2 if run.stage2.is_dir() else run.stage1
    model = load_vae_gmm(stage)
    home_U = training_routes(data, stage / ROUTES_FILE).user_means_UK.argmax(axis=1)
    ranked = PairFeatures.read(data, home_U, model.config.clusters)
    rows = [row for row in data.table(split).to_pylist() if row["features"] and row["item"] < data.catalog.known_items]
    routes = route_pairs(model, np.array([row["user"] for row in rows]), np.array([row["item"] for row in rows]))
    scores: dict[str, Any] = {"rows": len(rows)}
    for name, choose in choosers(data, ranked).items():
        hits = []
        for row, gamma_K in zip(rows, routes.responsibilities.tolist(), strict=True):
            found = set(choose(row["user"], row["item"], gamma_K)) & set(row["features"])
            hits.append((len(found) / len(set(row["features"])), len(found) / AT))
        recall, precision = 100 * np.mean(hits, axis=0)
        scores[name] = {"recall": float(recall), "precision": float(precision)}
    if texts:
        scores["texts"] = {
            name: _texts(run, data, choice, split, texts) for name, choice in (("usual", None), ("ranked", ranked))
        }
    return scores


def _texts(run: Run, data: Dataset, ranked: PairFeatures | None, split: str, rows: int) -> dict[str, float]:
    """Scores of texts that are written with features so chosen."""
    values = [f"evaluation.rows={rows}", "evaluation.protocol=predicted", "evaluation.probe_rows=0"]
    config = override_config(run.config, values)
    writer = ExplanationGenerator.load(run.stage2)
    writer.filler._pair_features = ranked
    result = evaluate(writer, data, config, split=split, routes=run.stage1 / ROUTES_FILE)
    named, kept = 0, 0
    for row in result.generations.to_pylist():
        wanted = set(row["features"])
        named += len(wanted)
        kept += sum(feature in row["generated"].lower() for feature in wanted)
    metrics = result.metrics["metrics"]
    return {"feature recall": 100 * kept / max(named, 1), "BLEU-4": metrics["bleu_4"], "ROUGE-L": metrics["rouge_l"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.runs:
        print("name a run folder: python -m benchmarks.pair_features RUN")
        return
    results = {str(path): measure(open_run(path), arguments.split, arguments.texts) for path in arguments.runs}
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for path, scores in results.items():
        texts = {f"texts, {name}": values for name, values in scores.pop("texts", {}).items()}
        print(f"\n{path}, {scores.pop('rows')} rows")
        for name, values in (scores | texts).items():
            print(f"  {name:26} " + "  ".join(f"{key} {value:.2f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
