"""Settings of the measures and of the rows that are evaluated."""

from typing import Literal

from gavamoe.config.section import Count, Section


class EvaluationConfig(Section):
    """Measures of `gavamoe evaluate`, and the rows of a split that are evaluated."""

    rows: Count = 0
    """Rows of the split that are evaluated, chosen by the seed; 0: all."""
    protocol: Literal["given", "predicted", "both"] = "given"
    """Origin of a request's rating and features. given: from the row (the paper's); predicted: stage 1's rating
    and the features that a review of the pair names most probably."""
    style: Literal["sacrebleu", "peter", "both"] = "sacrebleu"
    """Family of BLEU and ROUGE: the libraries sacrebleu and rouge-score, or the PETER line of papers."""
    probe_rows: Count = 200
    """Rows, at most, whose user is swapped and that are read through every gate; 0: n-gram scores only."""
    bertscore_model: str = ""
    """Hub id or folder of the model for BERTScore; empty: it is not measured."""
    bertscore_layer: Count = 0
    """Layer of the BERTScore model whose states are compared; 0: bert-score's own choice for a known id, the last layer
    for a folder."""
    row_losses: bool = False
    """Whether losses.parquet is written: how likely the model finds each row's own text, with less and less known of
    the user. `gavamoe ablate` always writes it, to compare systems on the same rows."""
