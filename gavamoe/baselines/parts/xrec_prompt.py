"""XRec's prompts as token ids; in brackets what is known, or wanted:

    Explain the recommendation.
    User: [slot] Item: [slot] [Title: ...] [User profile: often mentions a, b] [Item profile: known for c, d]
    [Rating: positive|neutral|negative] [Features: a, b]
    Explanation:

Without `stage2.prompt.instruction`, the labels are those of the explainer's prompts in marks, a mark a part.

In XRec's code the answer stands before the end of the instruction in training, and is asked for behind it afterwards;
here it follows the same marker in both. Rating and features, of the "+" form alone, are ours. Pieces are tokenized one
by one, special tokens are never parsed in them, and slots are ids above the vocabulary, so no text can forge one. Too
long a prompt loses tokens of the item's profile first, then of the user's, of the title, of the features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gavamoe.baselines.frame import Columns, Reader
from gavamoe.baselines.parts.profiles import Profiles
from gavamoe.errors import InputError
from gavamoe.generation.prompts import labels, plain_line
from gavamoe.model.base_model import encode_texts

_PARTS = ("title", "user profile", "item profile", "rating", "features")
_PROFILES = ("\nUser profile: often mentions", "\nItem profile: known for")
_PROFILE_MARKS = ("<", ">")
"""What stands before the profiles; before the other parts the explainer's own labels do."""
_CHARACTERS_PER_TOKEN = 16
"""Text beyond this many characters a token is not even tokenized."""

Parts = list[tuple[str, str]]
"""Names of `_PARTS` with their texts, which may be empty."""


@dataclass(frozen=True)
class XrecPrompts:
    """Builds prompts for one model."""

    slots: tuple[int, int]
    """The ids that stand for the user and the item."""
    named: bool
    """Whether prompts name rating and features."""
    profile_features: int
    """Features of a profile at most; 0: there are no profiles."""

    def prefixes(self, columns: Columns, profiles: Profiles | None, reader: Reader) -> list[list[int]]:
        """Token ids of each row's prompt.

        Raises:
            InputError: `stage2.prompt.max_tokens` has no room for what is never cut.
        """
        known = [self._known(columns, profiles, row, reader) for row in range(len(columns))]
        asked = [self._asked(columns, row, reader) for row in range(len(columns))]
        texts = _encoded((text for parts in (*known, *asked) for _, text in parts), reader)
        own = labels(reader.prompt)
        profile_labels = _PROFILES if reader.prompt.instruction else _PROFILE_MARKS
        before = (own.title, *profile_labels, own.rating, own.features)
        start, item, answer, *marks = encode_texts(reader.tokenizer, [own.instruction, own.item, own.answer, *before])
        ids = dict(zip(_PARTS, marks, strict=True))
        head = [reader.start, *start, self.slots[0], *item, self.slots[1]]
        room = reader.prompt.max_tokens - len(head) - len(answer)
        if room < 0:
            raise InputError(
                f"stage2.prompt.max_tokens: {reader.prompt.max_tokens} is below the {len(head) + len(answer)} tokens"
                " of XRec's prompt without title, profiles, rating and features"
            )
        prompts = []
        for first, behind in zip(known, asked, strict=True):
            last = _fitting(behind, ids, texts, room)
            prompts.append([*head, *_fitting(first, ids, texts, room - len(last)), *last, *answer])
        return prompts

    def _known(self, columns: Columns, profiles: Profiles | None, row: int, reader: Reader) -> Parts:
        """Title and profiles; those of a training row without its own features."""
        title = (columns.titles[row] or "") if reader.prompt.title else ""
        if profiles is None or not self.profile_features:
            return [("title", title)]
        own = columns.features[row] if columns.rows is not None else ()
        user = profiles.users.most_frequent(int(columns.users[row]), self.profile_features, own)
        item = profiles.items.most_frequent(int(columns.items[row]), self.profile_features, own)
        return [("title", title), ("user profile", ", ".join(user)), ("item profile", ", ".join(item))]

    def _asked(self, columns: Columns, row: int, reader: Reader) -> Parts:
        """The sentiment of a given rating, and the features, in the form that reads them."""
        if not self.named:
            return []
        rating = float(columns.ratings[row])
        sentiment = "" if reader.scale is None or rating != rating else reader.scale.sentiment(rating)
        return [("rating", sentiment), ("features", ", ".join(columns.features[row][: reader.prompt.max_features]))]


def _encoded(texts: Iterable[str], reader: Reader) -> dict[str, list[int]]:
    """Token ids of " text" for each distinct text."""
    distinct = list(dict.fromkeys(texts))
    lines = [plain_line(text, reader.prompt.max_tokens * _CHARACTERS_PER_TOKEN) for text in distinct]
    encoded = encode_texts(reader.tokenizer, [f" {line}" if line else "" for line in lines])
    return {text: list(ids) for text, ids in zip(distinct, encoded, strict=True)}


def _fitting(
    parts: Parts, labels: Mapping[str, Sequence[int]], texts: Mapping[str, Sequence[int]], room: int
) -> list[int]:
    """Labels and texts, as much as fits; no label without a token behind it."""
    said: list[int] = []
    for label, text in parts:
        left = room - len(said)
        if texts[text] and left > len(labels[label]):
            said += [*labels[label], *texts[text]][:left]
    return said
