"""BERTScore: empty texts, models and layers, the floor of mismatched references, rescaling."""

from pathlib import Path

import numpy as np
import pytest

from gavamoe.errors import InputError
from gavamoe.evaluation.metrics.bertscore import BertScore, bert_score, mismatched_pairs
from gavamoe.evaluation.metrics.text_scores import RowStatistics, aggregate, measure


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a word-piece vocabulary of letters."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz.,!"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bertscore_from_a_folder_scores_empty_texts_zero(encoder: Path) -> None:
    scored = bert_score(
        ["pool was cold", "", "pool was cold", "x"], ["pool was cold", "a", "", "the view"], str(encoder)
    )
    assert (scored.model, scored.layer) == (str(encoder), 2)
    assert scored.values[0] == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
    assert scored.values[1:3].tolist() == [[0.0] * 3] * 2
    precision, recall, f = scored.values[3]
    assert f == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    found = aggregate(measure(["a"] * 4, ["b"] * 4, bertscore=scored))
    assert found["bertscore_f"] == pytest.approx((1 + f) / 4, abs=1e-4)


def test_bertscore_names_wrong_models_and_layers(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"layer 9: .* has 2 layers"):
        bert_score(["a"], ["b"], str(encoder), 9)
    with pytest.raises(InputError, match=r"config.json is missing"):
        bert_score(["a"], ["b"], str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="neither a local folder nor available from the hub"):
        bert_score(["a"], ["b"], "nobody/no-such-encoder")


def _statistics(values: np.ndarray) -> RowStatistics:
    texts = ["a"] * len(values)
    return measure(texts, texts, bertscore=BertScore(values, "m", 1))


def test_bertscore_is_the_mean_over_rows() -> None:
    values = np.array([[0.2, 0.4, 0.3], [0.6, 0.0, 0.1]])
    found = aggregate(_statistics(values))
    assert [found[f"bertscore_{name}"] for name in "prf"] == pytest.approx([0.4, 0.2, 0.2])


def test_values_equal_bert_scores_own_call(encoder: Path) -> None:
    from bert_score import score

    said, meant = ["pool was cold", "a view"], ["the pool was warm", "no view at all"]
    theirs = score(said, meant, model_type=str(encoder), num_layers=2)
    ours = bert_score(said, meant, str(encoder))
    assert ours.values == pytest.approx(np.stack([part.numpy() for part in theirs], axis=1), abs=1e-6)


def encoder_without_length(folder: Path, family: str) -> Path:
    """An encoder of few positions whose tokenizer does not say how long a text may be, as DeBERTa's."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    words = ["<s>", "<pad>", "</s>", "<unk>", *"the pool was cold and nice".split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    )
    assert saved.model_max_length > 10**20
    saved.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 24, "pad_token_id": 1,
    }  # fmt: skip
    model = RobertaModel(RobertaConfig(**sizes)) if family == "roberta" else BertModel(BertConfig(**sizes))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "words"), [("bert", 22), ("roberta", 20)])
def test_texts_are_cut_where_the_models_positions_end(family: str, words: int, tmp_path: Path) -> None:
    """Of 24 positions two belong to the marks at the ends; RoBERTa leaves two more unused."""
    folder = str(encoder_without_length(tmp_path, family))
    text = ["the pool was cold and nice" + " pool" * (words - 6)]
    same = bert_score([text[0] + " and nice the cold"], text, folder)
    assert same.values[0] == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
    longer = bert_score([text[0].removesuffix(" pool") + " nice"], text, folder)
    assert longer.values[0, 2] < 0.999


def test_floor_is_measured_on_mismatched_references_and_rescales(encoder: Path) -> None:
    references = ["pool was cold", "the view", "no staff, no key"]
    scored = bert_score(references, references, str(encoder), seed=4)
    pairs = mismatched_pairs(references, 500, 4)
    alone = bert_score([one for one, _ in pairs], [other for _, other in pairs], str(encoder))
    assert scored.floor_pairs == 3
    assert scored.floor == pytest.approx(alone.values.mean(axis=0), abs=1e-5)
    found = aggregate(measure(references, references, bertscore=scored))
    assert found["bertscore_f_rescaled"] == pytest.approx(1.0, abs=1e-4)
    shown = scored.described()
    assert shown["floor"]["f"] == pytest.approx(scored.floor[2])
    assert bert_score(["a", "b"], ["c", "c"], str(encoder)).floor is None


def test_rescaling_by_hand() -> None:
    scored = BertScore(np.array([[0.7, 0.4, 0.55]]), "m", 1, floor=np.array([0.4, 0.4, 0.4]), floor_pairs=2)
    found = aggregate(measure(["a"], ["a"], bertscore=scored))
    assert found["bertscore_p_rescaled"] == pytest.approx(0.5)
    assert found["bertscore_r_rescaled"] == pytest.approx(0.0)
    assert found["bertscore_f_rescaled"] == pytest.approx(0.25)


def test_mismatched_pairs_hold_different_texts_each_once() -> None:
    pairs = mismatched_pairs(["a", "b", "b", "", "c", "d"], 3, seed=0)
    assert len(pairs) == 3
    assert all(one != other and one and other for one, other in pairs)
    assert len({one for one, _ in pairs}) == 3
    assert mismatched_pairs(["a", "a"], 3, seed=0) == []
