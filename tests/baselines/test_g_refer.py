"""The baseline G-Refer: what is retrieved as evidence, what the prompt quotes, losses, its folder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.stage2_runs import save_base
from helpers.tiny import tiny
from safetensors.torch import load_file

from gavamoe.baselines.frame import Columns, Reader
from gavamoe.baselines.g_refer import GRefer
from gavamoe.baselines.parts.evidence import EVIDENCE_FILE, Evidence
from gavamoe.baselines.training import Rows, train_baseline
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.generation.evidence.quotes import FeatureIndex
from gavamoe.runtime.context import LocalContext
from gavamoe.stage2.tokenized_rows import prompt_builder, rating_scale, rows_with_text, validation_rows


def config_of(*overrides: str) -> RunConfig:
    return tiny("system=g-refer", *overrides)


def reader_of(config: RunConfig, data: Dataset) -> Reader:
    return Reader(prompt_builder(config, data).tokenizer, config.stage2.prompt, rating_scale(data))


def g_refer(data: Dataset, *overrides: str, features: bool = False) -> GRefer:
    config = config_of(*overrides)
    torch.manual_seed(0)
    return GRefer.create(config, data, reader_of(config, data), features=features).eval()


def evidence(*rows: tuple[int, int, tuple[str, ...]]) -> Evidence:
    """Rows of (user, item, features), numbered from 100 on."""
    users, items, features = zip(*rows, strict=True)
    columns = {
        "row": pa.array(range(100, 100 + len(rows)), pa.int64()),
        "user": pa.array(users, pa.int32()),
        "item": pa.array(items, pa.int32()),
        "text": [f"text {number}" for number in range(len(rows))],
        "features": pa.array(list(map(list, features)), pa.list_(pa.string())),
    }
    return Evidence(pa.table(columns))


def columns_of(*pairs: tuple[int, int], rating: float = 5.0) -> Columns:
    return Columns(
        users=np.array([user for user, _ in pairs]),
        items=np.array([item for _, item in pairs]),
        ratings=np.full(len(pairs), rating, np.float32),
        features=[("battles",)] * len(pairs),
        titles=[None] * len(pairs),
    )


def test_a_planted_twin_is_found_first() -> None:
    found = evidence(
        (5, 0, ("plot",)),  # a stranger on the item
        (1, 0, ("ghosts",)),  # the twin on the item
        (0, 1, ("Ghosts", "clues")),
        (1, 2, ("ghosts", "clues")),
        (5, 3, ("pace",)),
    )
    assert found.nearest(0, 0, 2) == ([1, 0], [2])
    assert found.nearest(0, 0, 1) == ([1], [2])
    assert found.nearest(0, 0, 2, least=0.5)[0] == [1]


def test_the_likest_item_of_the_user_is_found_first() -> None:
    found = evidence((0, 1, ("plot",)), (0, 2, ("ghosts",)), (1, 3, ("ghosts",)), (0, 4, ("pace",)))
    assert found.nearest(0, 3, 2) == ([2], [1, 0])  # equals stand in file order


def test_features_of_the_row_itself_tell_nothing_of_its_user() -> None:
    rows = [(0, 0, ("ghosts",)), (0, 1, ("clues",)), (1, 0, ("ghosts",)), (2, 0, ("clues",))]
    assert evidence(*rows).nearest(0, 0, 2)[0] == [2, 3]
    assert evidence(*rows).nearest(0, 0, 2, row=100)[0] == [3, 2]
    again = [*rows, (0, 4, ("ghosts",))]  # another row of the user speaks of it too
    assert evidence(*again).nearest(0, 0, 2, row=100)[0] == [2, 3]


def test_neither_the_row_nor_another_of_its_pair_is_retrieved(planted: Dataset) -> None:
    rows = rows_with_text(planted, "train")
    found, pairs = Evidence.of_training(planted, rows), planted.arrays("train")
    some = 0
    for place, row in enumerate(rows.tolist()):
        user, item = int(pairs.user[row]), int(pairs.item[row])
        of_item, of_user = found.nearest(user, item, 3, row=row)
        assert place not in (*of_item, *of_user)
        assert all(pairs.item[rows[other]] == item and pairs.user[rows[other]] != user for other in of_item)
        assert all(pairs.user[rows[other]] == user and pairs.item[rows[other]] != item for other in of_user)
        some += len(of_item) + len(of_user)
    assert some > 5 * len(rows)
    twice = evidence((0, 0, ("a",)), (0, 0, ("a",)), (0, 0, ("a",)))
    assert twice.nearest(0, 0, 2, row=101) == twice.nearest(0, 0, 2) == ([], [])


def test_likeness_is_that_of_the_copying_systems(planted: Dataset) -> None:
    rows = planted.table("train", ["user", "item", "features"]).to_pylist()
    found = Evidence.of_training(planted, np.arange(len(rows)))
    known = planted.catalog.known_users
    sets = [sorted({word for row in rows if row["user"] == user for word in row["features"]}) for user in range(known)]
    index = FeatureIndex(sets)
    for user in range(0, known, 7):
        for item in range(0, planted.catalog.known_items, 5):
            places = [place for place, row in enumerate(rows) if row["item"] == item and row["user"] != user]
            like = index.similarity(sets[user], np.array([rows[place]["user"] for place in places], dtype=np.int64))
            order = np.argsort(-like.round(9), kind="stable")[:2]
            assert found.nearest(user, item, 2)[0] == [places[place] for place in order]


def test_the_prompt_quotes_what_is_retrieved(planted: Dataset) -> None:
    model, reader = g_refer(planted, "baselines.g_refer.quoted_tokens=64"), reader_of(config_of(), planted)
    [ids] = model.prefixes(columns_of((2, 3)), reader)
    said = reader.tokenizer.decode(ids)
    of_item, of_user = model.evidence.nearest(2, 3, 2)
    places = [said.index(f"\n- {model.evidence.texts[place]}") for place in (*of_item, *of_user)]
    leads = said.index("others on this item:"), said.index("this user on others:")
    assert len(of_item) == len(of_user) == 2
    assert leads[0] < places[0] < places[1] < leads[1] < places[2] < places[3] < said.index("explanation:")
    [short] = g_refer(planted, "baselines.g_refer.quoted_tokens=2").prefixes(columns_of((2, 3)), reader)
    texts = [model.evidence.texts[place] for place in (*of_item, *of_user)]
    assert len(ids) - len(short) == sum(len(encoded) - 2 for encoded in reader.encode(texts, 64))


def test_without_evidence_the_prompt_is_the_one_without_it(planted: Dataset) -> None:
    reader = reader_of(config_of(), planted)
    strangers = columns_of((10_000, 10_000))
    model = g_refer(planted)
    bare = [reader.start, *model.spec.wording.explanation]
    assert model.prefixes(strangers, reader) == [bare]
    picky = g_refer(planted, "baselines.g_refer.least_likeness=1")
    picky.evidence = evidence((0, 0, ("a",)), (1, 1, ("b",)), (1, 0, ("b",)))
    assert picky.prefixes(columns_of((0, 1)), reader) == [bare]
    one_sided = model.prefixes(columns_of((10_000, 3)), reader)[0]
    said = reader.tokenizer.decode(one_sided)
    assert "others on this item:" in said
    assert "this user on others:" not in said


def test_only_the_form_with_features_reads_sentiment_and_features(planted: Dataset) -> None:
    reader = reader_of(config_of(), planted)
    [plain] = g_refer(planted).prefixes(columns_of((2, 3)), reader)
    [given] = g_refer(planted, features=True).prefixes(columns_of((2, 3)), reader)
    assert plain[0] == reader.start
    assert given[-len(plain) :] == plain
    assert reader.tokenizer.decode(given[: -len(plain)]) == "positive, battles"


def test_training_rows_are_read_without_themselves_and_others_as_strangers_would_be(
    planted: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = g_refer(planted), config_of()
    reader, seen, nearest = reader_of(config, planted), [], model.evidence.nearest

    def recorded(user: int, item: int, count: int, least: float, row: int | None) -> tuple[list[int], list[int]]:
        seen.append((user, item, row))
        return nearest(user, item, count, least, row)

    monkeypatch.setattr(model.evidence, "nearest", recorded)
    for split, rows in (("train", np.array([3, 8, 20])), ("valid", validation_rows(config, planted)[:3])):
        seen.clear()
        Rows.read(planted, split, rows, model, reader)
        pairs = planted.arrays(split)
        own = rows.tolist() if split == "train" else [None] * 3
        assert seen == list(zip(pairs.user[rows].tolist(), pairs.item[rows].tolist(), own, strict=True))


def test_the_loss_by_hand_and_padding(planted: Dataset) -> None:
    model = g_refer(planted)
    tokens = torch.tensor([[2, 5, 6, 8, 9, 1], [2, 5, 8, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 8, 9, 1], [-100, -100, 8, 1, -100, -100]])
    batch = {"tokens": tokens, "labels": labels, "prefix": torch.tensor([3, 2])}
    with torch.inference_mode():
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        scores = model.lm(input_ids=tokens, attention_mask=mask).logits.log_softmax(dim=-1)
        places = [(0, 2, 8), (0, 3, 9), (0, 4, 1), (1, 1, 8), (1, 2, 1)]
        by_hand = -torch.stack([scores[row, place, word] for row, place, word in places]).mean()
        torch.testing.assert_close(model.losses(batch)["loss"], by_hand)
        alone = {name: values[1:] for name, values in batch.items()}
        cut = alone | {name: alone[name][:, :4] for name in ("tokens", "labels")}
        torch.testing.assert_close(model.losses(alone)["loss"], model.losses(cut)["loss"])


def test_a_pretrained_model_is_frozen_and_the_folder_holds_the_evidence(planted: Dataset, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = config_of(f"stage2.base_model={base}", "stage2.max_steps=2")
    folder = tmp_path / "baseline"
    train_baseline(config, planted.path, folder, LocalContext())
    after, before = load_file(folder / "weights.safetensors"), load_file(base / "model.safetensors")
    kept = {name.replace(".base_layer.", "."): tensor for name, tensor in after.items()}
    assert all(torch.equal(kept[f"lm.{name}"], tensor) for name, tensor in before.items())
    assert any(bool(tensor.any()) for name, tensor in after.items() if ".lora_B." in name)
    writer, model = BaselineWriter.load(folder), g_refer(planted)
    assert isinstance(writer.model, GRefer)
    assert writer.model.evidence.texts == model.evidence.texts
    assert set(model.evidence.texts) <= set(planted.table("train", ["text"])["text"].to_pylist())
    pairs = [(2, 3), (5, 1), (10_000, 4)]
    assert [writer.model.evidence.nearest(*pair, 2) for pair in pairs] == [
        model.evidence.nearest(*pair, 2) for pair in pairs
    ]
    (folder / EVIDENCE_FILE).unlink()
    with pytest.raises(InputError, match=EVIDENCE_FILE):
        BaselineWriter.load(folder)
