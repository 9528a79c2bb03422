"""Writers that are told what to say, in place of a trained explainer."""

from collections.abc import Callable, Sequence

from gavamoe.config.schema import GenerationConfig
from gavamoe.data.dataset import Dataset, Truth
from gavamoe.data.ratings import PLANTED_SCALE
from gavamoe.data.synthetic import grammar
from gavamoe.generation.generator import Explanation
from gavamoe.generation.request import ExplanationRequest


class FakeExplainer:
    """Says what `text` makes of a request; cluster = user modulo 3; predicts 3 stars."""

    def __init__(self, dataset: Dataset, text: Callable[[ExplanationRequest], str]) -> None:
        self.catalog, self.text = dataset.catalog, text
        self.asked: list[ExplanationRequest] = []

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Explanation]:
        self.asked = list(requests)
        if on_progress:
            on_progress(len(requests), len(requests))
        return [self._explain(request) for request in requests]

    def _explain(self, request: ExplanationRequest) -> Explanation:
        cluster = request.user % 3
        return Explanation(
            text=self.text(request),
            cluster=cluster,
            responsibilities=tuple(1.0 if k == cluster else 0.0 for k in range(3)),
            rating=request.rating,
            rating_given=request.rating is not None,
            predicted_rating=3.0,
            features=request.features or (),
            features_given=request.features is not None,
            user_known=request.user < self.catalog.known_users,
            item_known=request.item < self.catalog.known_items,
            new_tokens=5,
        )


def parrot(dataset: Dataset, split: str = "test") -> Callable[[ExplanationRequest], str]:
    """Says the reference of the request's pair; nothing for other pairs."""
    table = dataset.table(split, ["user", "item", "text"]).to_pydict()
    known = {(u, i): text for u, i, text in zip(table["user"], table["item"], table["text"], strict=True)}
    return lambda request: known.get((request.user, request.item), "")


def planted_writer(truth: Truth, *, group: int | None = None) -> Callable[[ExplanationRequest], str]:
    """Says what the generator would: the style of the user's group (or of `group`), the rating's sentiment."""

    def say(request: ExplanationRequest) -> str:
        style = grammar.STYLES[int(truth.group[request.user]) if group is None else group]
        sentiment = PLANTED_SCALE.sentiment(3.0 if request.rating is None else request.rating)
        return grammar.sentence(style, sentiment, tuple(request.features or ("clues",))[:2], (0, 0, 0, 0))

    return say
