"""Requests and responses of the HTTP interface, with every bound on what a client may send.

The bounds here are ceilings of the format; a server's own limits (`ServeArgs`) may be lower.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from gavamoe.config.section import StrictNumbers
from gavamoe.data.bounds import MAX_FEATURE_CHARS, MAX_ID_CHARS
from gavamoe.stage1.strangers.history import MAX_HISTORY, HistoryEntry, printable

MAX_FEATURES = 16
MAX_BATCH = 64
MAX_RECOMMEND = 50
MAX_NEW_TOKENS = 512
MAX_CANDIDATES = 1000


RawId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(printable)]
Feature = Annotated[str, Field(min_length=1, max_length=MAX_FEATURE_CHARS), AfterValidator(printable)]
Features = Annotated[list[Feature], Field(max_length=MAX_FEATURES)]
History = Annotated[list[HistoryEntry], Field(max_length=MAX_HISTORY)]


class _Model(StrictNumbers):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class _OfUser(_Model):
    user: RawId | None = None
    """By the dataset's own id. One that training never saw is served and reported as such; may be left out with a
    history."""
    history: History = Field(default_factory=list)
    """What a user that training never saw tells of itself; it is used for this answer, and neither kept nor logged."""

    @model_validator(mode="after")
    def _is_somebody(self) -> "_OfUser":
        if self.user is None and not self.history:
            raise ValueError("needs a user, or a history of one that training never saw")
        return self


class PairRequest(_OfUser):
    """A user and an item."""

    item: RawId
    """By the dataset's own id. One that training never saw is served and reported as such."""


class TextOptions(_Model):
    """How texts are written; what is left out is the server's default."""

    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    """0: greedy, the same text every time."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed gives the same text, whatever else the server writes at the time."""
    trace: bool = False
    """Also tell which experts the text's tokens took."""


class ExplainItem(PairRequest):
    """One pair of a batch."""

    rating: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    """Left out: stage 1's prediction takes its place."""
    features: Features | None = None
    """Left out: those that a review of the pair names most probably; empty: none."""


class ExplainRequest(ExplainItem, TextOptions):
    """Explain one pair."""

    stream: bool = False
    """Answer with server-sent events: route, token (many), done; or error."""


class BatchRequest(TextOptions):
    """Explain many pairs; the answers are in the order of the requests."""

    requests: Annotated[list[ExplainItem], Field(min_length=1, max_length=MAX_BATCH)]


class RecommendRequest(TextOptions, _OfUser):
    """Rank items for a user by predicted rating, and explain the first k."""

    k: Annotated[int, Field(ge=1, le=MAX_RECOMMEND)] = 5
    candidates: Annotated[list[RawId], Field(min_length=1, max_length=MAX_CANDIDATES)] | None = None
    """Items to choose from; left out: all known items."""
    exclude_seen: bool | None = None
    """Leave out the items of the user's training rows, or of its history: the default without `candidates`, and refused
    with them, as what is missing of items that a caller names would tell what the user has reviewed."""
    explain: bool = True
    """False: rank only."""

    @model_validator(mode="after")
    def _tells_no_history(self) -> "RecommendRequest":
        if self.candidates is not None and self.exclude_seen:
            raise ValueError("exclude_seen can't be true with candidates: it would tell what the user has reviewed")
        return self


class RouteResponse(_Model):
    """What stage 1 says about a pair."""

    user: str | None
    """As asked for; null with a history alone."""
    item: str
    item_title: str | None
    user_known: bool
    item_known: bool
    history_entries: int
    """Entries of a history that the user was routed by."""
    cluster: int
    responsibilities: list[float]
    """One per cluster (Eq. 8); they sum to 1."""
    predicted_rating: float
    """The probability of interaction where the data have no ratings."""
    model_version: str


class TimingsMs(_Model):
    """Milliseconds of an answer, by what they were spent on."""

    route: float
    queue: float
    """Waiting for a slot in the engine."""
    prefill: float
    decode: float
    total: float
    """From arrival to answer in the server, calls between its replicas included."""


class Explanation(RouteResponse):
    """A text and everything that went into it."""

    text: str
    rating: float | None
    """The rating whose sentiment the prompt named; null where the data have no ratings."""
    rating_given: bool
    features: list[str]
    features_given: bool
    new_tokens: int
    """Written, the end of text included."""
    finish_reason: Literal["end", "length", "withheld"]
    """The text came to its end, was cut at its largest length, or repeats what one other user wrote and is not sent
    (`withhold` in the server's settings): then `text` is empty."""
    experts: list[list[int]] | None
    """With `trace`: per layer and expert, how many of the prompt's and text's tokens it was chosen for."""
    timings_ms: TimingsMs


class BatchResponse(_Model):
    results: list[Explanation]


class RankedItem(_Model):
    """One recommended item; `explanation` is null if only ranks were asked for."""

    rank: int
    item: str
    title: str | None
    predicted_rating: float
    cluster: int
    explanation: Explanation | None


class RecommendResponse(_Model):
    user: str | None
    user_known: bool
    ranked: int
    """Items to choose from, those that were left out as seen among them."""
    unknown_candidates: list[str]
    """Candidates that training never saw; they are not ranked."""
    items: list[RankedItem]
    model_version: str


class CatalogEntry(_Model):
    """A user or an item."""

    id: str
    title: str | None
    known: bool
    """Seen in training."""
    count: int
    """Its training rows."""
    features: list[str]
    """Usual ones of an item; none of a user, whose own words they would be."""


class CatalogResponse(_Model):
    results: list[CatalogEntry]
    total: int
    """Entries that match, of which `results` are the first."""


class ClusterInfo(_Model):
    """What tells a cluster apart, from the training pairs routed to it."""

    cluster: int
    share: float
    """Share of all training pairs that go to it."""
    mean_predicted_rating: float | None
    words: list[str]
    """Words and punctuation marks that its users write, by lift; empty without texts."""
    features: list[str]
    """Usual features of its items, by lift: how much more frequent they are in it than overall."""


class ServerInfo(_Model):
    """What is being served."""

    model_version: str
    clusters: list[ClusterInfo]
    rating_scale: tuple[float, float] | None
    known_users: int
    known_items: int
    max_new_tokens: int
    layers: int
    experts: int
    """Per layer; 0 for a model without."""


class Status(_Model):
    status: Literal["ok", "ready", "not ready"]
    detail: str | None = None


class ErrorDetail(_Model):
    code: str
    """Stable, for programs: invalid_request, unauthorized, overloaded, timeout, interrupted, internal, ..."""
    message: str
    field: str | None = None
    request_id: str | None = None


class ErrorResponse(_Model):
    """Every answer that is not 200 has this form."""

    error: ErrorDetail
