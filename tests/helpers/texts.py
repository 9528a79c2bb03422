"""Four pairs of texts, and their scores."""

from gavamoe.evaluation.metrics.text_scores import Style, aggregate, measure

CANDIDATES = ["The room was clean and quiet.", "great pool, great staff!", "", "The breakfast was cold and late."]

REFERENCES = ["The room was very clean and quiet.", "Great pool.", "Nothing works here.", "The breakfast was cold."]


def scores(candidates: list[str], references: list[str], style: Style = "sacrebleu") -> dict[str, float | None]:
    return aggregate(measure(candidates, references, style=style))
