"""The report page: what it shows, what it survives, and that no text of a user becomes markup."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.bare_dataset import bare_dataset
from helpers.losses import difference, loss_comparison
from helpers.pages import HOSTILE, Page
from helpers.writers import FakeExplainer, parrot
from matplotlib.image import imread, imsave

from gavamoe.artifacts.files import write_json
from gavamoe.artifacts.manifest import write_manifest
from gavamoe.config.files import dump_config, parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.comparison_files import write_comparison
from gavamoe.evaluation.evaluate import evaluate, write_evaluation
from gavamoe.evaluation.evaluated_run import read_run
from gavamoe.experiments.ablate import run_ablation
from gavamoe.report.page import SAMPLES, render, write_report
from gavamoe.report.systems import case_study, open_runs


def make_run(folder: Path, dataset: Dataset, text: str | None = None, settings: RunConfig | None = None) -> Path:
    """An evaluated run folder with logs, as training and evaluation leave it."""
    settings = settings or RunConfig()
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(settings))
    writer = FakeExplainer(dataset, parrot(dataset) if text is None else lambda _: text)
    write_evaluation(folder / "evaluation", evaluate(writer, dataset, settings), settings, {})
    (folder / "stage1").mkdir()
    write_json(folder / "stage1" / "metrics.json", {"test": {"rmse": 0.123, "mae": 0.045}})
    lines = [{"phase": "stage1", "step": step, "loss": 1 / (step + 1), "kl": math.nan} for step in range(20)]
    lines.append({"phase": "stage1", "step": 20, "warning": f"collapse {HOSTILE}"})
    (folder / "logs" / "stage1.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_self_contained_and_shows_the_run(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "first", planted)
    out = write_report([run], run / "report.html")
    assert out == run / "report.html"
    page = read(out)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value is not None and value.startswith("#") for value in loaded)
    assert "http" not in out.read_text().replace('http-equiv="Content-Security-Policy"', "")
    targets = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for value in loaded if value} <= targets
    shown = {words.strip() for words in page.words}
    assert {"first", "BLEU-4 ↑", "loss", "ds1 (most frequent)", "User + item bias model"} <= shown
    assert "Stage 1 alone, whole test split 0.123 0.045" in page.text
    assert "Recovery of the 3 planted user groups" in page.text
    assert "No training log" not in page.text
    assert "people were not asked" in page.text


def test_latent_map_is_embedded_where_there_is_one(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "run", planted)
    (run / "clusters.png").write_bytes(b"\x89PNG")
    page = read(write_report([run], tmp_path / "report.html"))
    assert [value for name, value in page.attributes if name == "src"] == ["data:image/png;base64,iVBORw=="]


def test_latent_maps_stand_side_by_side_in_a_figure(tmp_path: Path, planted: Dataset) -> None:
    runs = [make_run(tmp_path / name, planted) for name in ("two", "three")]
    for run in runs:
        imsave(run / "clusters.png", np.zeros((4, 4, 3)))
    page = read(write_report(runs, tmp_path / "report.html", figures=tmp_path / "figures"))
    assert page.tags.count("img") == 2
    assert imread(tmp_path / "figures" / "figure5.png").shape[1] > 1000


def test_text_of_users_stays_text(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "hostile<script>", planted, HOSTILE)
    page = read(write_report([run], tmp_path / "report.html"))
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 2  # in the samples and in the warning
    assert "hostile<script>" in page.text


def test_runs_stand_side_by_side_with_the_best_marked(tmp_path: Path, planted: Dataset) -> None:
    good = make_run(tmp_path / "a" / "run", planted)
    bad = make_run(tmp_path / "b" / "run", planted, "bad text")
    page = read(write_report([good, bad], tmp_path / "two.html"))
    assert "a/run" in page.text
    assert "b/run" in page.text
    assert page.text.count("Reference:") <= SAMPLES + 1  # one reference for both runs' texts
    assert page.text.count("bad text") >= 6
    assert [value for name, value in page.attributes if name == "class"].count("best") >= 5


def test_runs_on_other_rows_show_their_own_samples(tmp_path: Path, planted: Dataset) -> None:
    few = parse_config({"evaluation": {"rows": 4}}, "test")
    one, two = make_run(tmp_path / "all", planted), make_run(tmp_path / "few", planted, settings=few)
    page = read(write_report([one, two], tmp_path / "two.html"))
    assert page.text.count("Reference:") > SAMPLES + 1


def test_implicit_data_without_features_or_logs(tmp_path: Path) -> None:
    dataset = bare_dataset(tmp_path / "data", [f"text number {n}" for n in range(10)])
    run = make_run(tmp_path / "run", dataset, "")
    (run / "logs" / "stage1.jsonl").unlink()
    page = read(write_report([run], tmp_path / "report.html"))
    assert "The dataset has no ratings." in page.text
    assert "No training log in the run folder." in page.text
    assert "1 of them are empty" in page.text
    assert "(empty)" in page.text


def test_long_texts_are_cut(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "run", planted, "word " * 5000, parse_config({"evaluation": {"rows": 8}}, "test"))
    out = write_report([run], tmp_path / "report.html")
    assert out.stat().st_size < 100_000
    assert "(25,000 characters)" in read(out).text


def test_what_is_not_evaluated_is_named_and_nothing_is_written(tmp_path: Path, planted: Dataset) -> None:
    with pytest.raises(InputError, match="name at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(InputError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    run = make_run(tmp_path / "run", planted)
    (run / "evaluation" / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="content differs"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_evaluation_of_another_version_is_named(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "run", planted)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    write_json(run / "evaluation" / "metrics.json", metrics | {"schema_version": 1})
    (run / "evaluation" / "artifact.json").unlink()
    write_manifest(run / "evaluation", "evaluation", RunConfig(), {})
    with pytest.raises(InputError, match=r"has schema version 1, this gavamoe reads 2 to \d; evaluate the run again"):
        write_report([run], tmp_path / "report.html")


def test_a_log_cut_by_a_crash_is_read_and_a_damaged_one_named(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "run", planted)
    log = run / "logs" / "stage1.jsonl"
    log.write_text('{"phase": "a", "step": 1, "loss": 2}\n{"phase": "a", "st')
    write_report([run], tmp_path / "report.html")
    log.write_text('{"phase": "a"\n{"phase": "a", "step": 1}\n')
    with pytest.raises(InputError, match=r"stage1.jsonl, line 1: not valid JSON"):
        write_report([run], tmp_path / "report.html")


def test_a_comparison_stands_for_its_systems(tmp_path: Path, planted: Dataset) -> None:
    out = tmp_path / "out"
    run_ablation(RunConfig(), planted.path, out, only=["constant", "copy-item", "copy-features"])
    path = write_report([out], out / "report.html", figures=tmp_path / "figures")
    page = read(path)
    assert "nearest of the item" in page.text
    assert "Differences under the same seed" in page.text
    assert page.text.count("Reference:") <= SAMPLES + 1
    assert "No training log" in page.text
    assert "Case study" not in page.text  # no trained run says how often a user was seen
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {"table1.csv", "table2.csv", "figure4.csv", "figure4.png"}
    with (tmp_path / "figures" / "table2.csv").open() as file:
        found = {(row["run"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    assert found["nearest of the item", "fmr"] == read_run(out / "copy-item" / "seed-0").score("fmr")
    assert found["constant text", "rmse"] == found["nearest by features", "rmse"]


def test_a_comparison_says_whether_gates_pay(tmp_path: Path, planted: Dataset) -> None:
    out = tmp_path / "out"
    found = run_ablation(RunConfig(), planted.path, out, only=["constant", "copy-item"])
    losses = loss_comparison([difference("base-wide", 0.021), difference("cluster-token", -0.2, group="20+")])
    losses = losses.model_copy(update={"unpaired": {"gpt2": "other tokens"}})
    write_comparison(out, found.model_copy(update={"losses": losses}))
    page = read(write_report([out], out / "report.html"))
    assert "A control is better, in nats a token: user's slot shown: users with 20 and more rows 0.200" in page.text
    assert "Shown : user's slot, item's slot, rating and features given." in page.text
    assert "+0.021 (+0.016 to +0.026) *" in page.text
    assert "shown: the best control's loss over GaVaMoE's" in page.text
    assert "20+: cluster token" in page.text
    assert "Not compared by loss: gpt2 (other tokens)" in page.text


def test_the_case_study_takes_the_least_and_the_most_seen_user(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "run", planted)
    planted.catalog.save(run / "stage2" / "catalog")
    other = make_run(tmp_path / "other", planted, HOSTILE)
    data, folders, _ = open_runs([run, other])
    sparse, dense = case_study(data, folders)
    rows = np.bincount(planted.arrays("train").user, minlength=planted.catalog.n_users)
    asked = {planted.catalog.user_id(user): rows[user] for user in planted.arrays("test").user.tolist() if rows[user]}
    assert sparse["training_rows"] == min(asked.values()) == asked[sparse["user"]]
    assert dense["training_rows"] == max(asked.values()) == asked[dense["user"]]
    assert [name for name, _ in sparse["texts"]] == ["run", "other"]
    assert sparse["texts"][0][1] == sparse["reference"]
    page = read(write_report([run, other], tmp_path / "report.html", figures=tmp_path / "figures"))
    assert f"Case 1: Limited interactions user {sparse['user']}, {sparse['training_rows']} training rows" in page.text
    assert not {"script", "img"} & set(page.tags)
    assert (tmp_path / "figures" / "table5.csv").is_file()


def test_human_scores_have_a_section(tmp_path: Path, planted: Dataset) -> None:
    run = make_run(tmp_path / "run", planted)
    one = {"value": 4.5, "low": 4.0, "high": 5.0}
    names = ["personalization", "quality", "satisfaction", "human_score"]
    result = {
        "raters": ["a", "b"], "texts": 2, "rated_by_two": 2, "weights": [0.4, 0.3, 0.3],
        "systems": [{"system": "<b>ours</b>", "rows": 2, "ratings": 4, "scores": dict.fromkeys(names, one)}],
        "gaps": [{"system": "<b>ours</b>", "other": "theirs", "rows": 2, "gap": one}],
        "agreement": dict.fromkeys(names, 0.5),
    }  # fmt: skip
    write_json(tmp_path / "result.json", result)
    page = read(write_report([run], tmp_path / "report.html", human=tmp_path / "result.json"))
    assert "Human-Score: 0.4 P + 0.3 Q + 0.3 U" in page.text
    assert "<b>ours</b> less theirs: 4.500 (4.000 to 5.000) on 2 rows" in page.text
    write_json(tmp_path / "result.json", {"raters": 3})
    with pytest.raises(InputError, match=r"result\.json: not the result of a human evaluation"):
        write_report([run], tmp_path / "report.html", human=tmp_path / "result.json")


def test_what_ngrams_hide_and_both_protocols_are_shown(tmp_path: Path, planted: Dataset) -> None:
    both = parse_config({"evaluation": {"protocol": "both", "rows": 30, "probe_rows": 10}}, "test")
    run = make_run(tmp_path / "run", planted, settings=both)
    page = read(write_report([run], tmp_path / "report.html"))
    assert "Given and predicted" in page.text
    assert "Item hallucination ↓" in page.text
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    metrics["faithfulness"]["gates"] = {"gates": 2, "rows": [10, 0], "loss": [[0.125, 0.5], None]}
    metrics["faithfulness"]["swaps"] = [{"item": "i", "user": "u", "text": HOSTILE, "other": "v", "swapped": "b"}]
    data = read_run(run)
    text = Page(render([replace(data, metrics=metrics)])).text
    assert "0 10 0.125 0.500 1 0 – –" in text
    assert f"i for u: “{HOSTILE}” For v: “b”" in text
    metrics["faithfulness"], metrics["predicted"] = None, None
    text = Page(render([replace(data, metrics=metrics)])).text
    assert "Faithfulness" not in text
    assert "Given and predicted" not in text
