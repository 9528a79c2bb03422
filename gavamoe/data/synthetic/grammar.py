"""The language of the synthetic generator: genres and their features, group styles, sentiment words, titles.

Data and one pure function. Phrases work for singular and plural features alike, so that no verb has to
agree. Feature words occur nowhere else in the language, alone or inside another word; a test holds that.
"""

from typing import NamedTuple

GENRES: dict[str, tuple[str, ...]] = {
    "mystery": ("detective", "clues", "alibi", "suspects", "motive", "interrogation"),
    "romance": ("courtship", "letters", "wedding", "heartbreak", "banter", "jealousy"),
    "science": ("spaceship", "robots", "colony", "physics", "aliens", "gravity"),
    "fantasy": ("dragons", "wizards", "prophecy", "kingdom", "spells", "creatures"),
    "history": ("battles", "costumes", "politics", "rebellion", "archives", "generals"),
    "comedy": ("slapstick", "jokes", "puns", "satire", "pranks", "nonsense"),
    "horror": ("ghosts", "screams", "cellar", "curses", "monsters", "nightmares"),
    "adventure": ("jungle", "treasure", "expedition", "rapids", "volcano", "ruins"),
    "music": ("melody", "chorus", "orchestra", "lyrics", "rhythm", "violins"),
    "sport": ("stadium", "coach", "championship", "stamina", "penalties", "rivals"),
    "travel": ("scenery", "villages", "railways", "harbours", "festivals", "temples"),
    "cooking": ("recipes", "spices", "desserts", "flavours", "bakers", "vineyards"),
}


class Style(NamedTuple):
    """The style of one group's texts. `one` and `two` hold {f} {g} for features and {a} {b} for sentiment words."""

    one: tuple[str, ...]
    two: tuple[str, ...]
    closings: tuple[str, ...]
    positive: tuple[str, ...]
    neutral: tuple[str, ...]
    negative: tuple[str, ...]

    def adjectives(self, sentiment: str) -> tuple[str, ...]:
        """This group's words for "positive", "neutral" or "negative"."""
        words: tuple[str, ...] = getattr(self, sentiment)
        return words


STYLES: tuple[Style, ...] = (
    Style(
        one=("what {a} {f}", "honestly, such {a} {f}", "wow, really {a} {f}"),
        two=("what {a} {f} and {b} {g}", "honestly, such {a} {f} plus {b} {g}", "wow, really {a} {f}, then {b} {g}"),
        closings=("!", ", no kidding!", ", my friends agree!"),
        positive=("awesome", "fantastic", "gorgeous", "lovely"),
        neutral=("okay", "passable", "modest"),
        negative=("awful", "horrid", "lousy", "silly"),
    ),
    Style(
        one=("the author renders the {f} in {a} fashion", "one finds the {f} rather {a}", "I consider the {f} {a}"),
        two=(
            "the author renders the {f} in {a} fashion, with {b} {g}",
            "one finds the {f} rather {a} and the {g} {b}",
            "I consider the {f} {a}, the {g} {b}",
        ),
        closings=(".", ", on balance.", ", upon reflection."),
        positive=("masterful", "exquisite", "refined", "superb"),
        neutral=("adequate", "ordinary", "conventional"),
        negative=("clumsy", "tedious", "shallow", "contrived"),
    ),
    Style(
        one=("we watched it at home: {a} {f}", "for our family {a} {f}", "our kids called the {f} {a}"),
        two=(
            "we watched it at home: {a} {f} with {b} {g}",
            "for our family {a} {f}, also {b} {g}",
            "our kids called the {f} {a} and the {g} {b}",
        ),
        closings=(".", " this weekend.", " all evening."),
        positive=("delightful", "charming", "heartwarming", "cheerful"),
        neutral=("average", "mild", "middling"),
        negative=("boring", "annoying", "dreadful", "tiresome"),
    ),
    Style(
        one=("verdict: {a} {f}", "short version: the {f} felt {a}", "bottom line, {a} {f}"),
        two=(
            "verdict: {a} {f}, {b} {g}",
            "short version: the {f} felt {a}, the {g} {b}",
            "bottom line, {a} {f} beside {b} {g}",
        ),
        closings=(".", ", period.", ", full stop."),
        positive=("solid", "sharp", "excellent", "impressive"),
        neutral=("standard", "usable", "unremarkable"),
        negative=("weak", "sloppy", "poor", "broken"),
    ),
    Style(
        one=("my heart says the {f} became {a}", "like a dream, {a} {f}", "under moonlight, {a} {f}"),
        two=(
            "my heart says the {f} became {a} and the {g} {b}",
            "like a dream, {a} {f} among {b} {g}",
            "under moonlight, {a} {f} over {b} {g}",
        ),
        closings=("...", ", sighing softly.", ", as poems do."),
        positive=("radiant", "enchanting", "luminous", "blissful"),
        neutral=("faint", "quiet", "muted"),
        negative=("bleak", "hollow", "dismal", "bitter"),
    ),
    Style(
        one=("compared with earlier work, {a} {f}", "technically the {f} look {a}", "by any measure, {a} {f}"),
        two=(
            "compared with earlier work, {a} {f} against {b} {g}",
            "technically the {f} look {a} while the {g} look {b}",
            "by any measure, {a} {f} next to {b} {g}",
        ),
        closings=(".", " in this edition.", " at this price."),
        positive=("precise", "polished", "outstanding", "flawless"),
        neutral=("typical", "acceptable", "serviceable"),
        negative=("faulty", "unfinished", "inferior", "careless"),
    ),
)

TITLE_ADJECTIVES = (
    "Copper", "Silver", "Hidden", "Wandering", "Crimson", "Velvet", "Northern", "Paper", "Cedar", "Amber",
    "Winter", "Distant", "Emerald", "Restless", "Borrowed", "Painted", "Seventh", "Salted", "Woven", "Marble",
    "Ivory", "Autumn", "Burning", "Drifting", "Glass", "Iron", "Lost", "Midnight", "Open", "Scarlet",
)  # fmt: skip
TITLE_NOUNS = (
    "Lantern", "Orchard", "Bridge", "Harp", "Lighthouse", "Window", "Garden", "Mirror", "Clock", "Feather",
    "Anchor", "Staircase", "Ladder", "River", "Meadow", "Key", "Carousel", "Umbrella", "Almanac", "Sparrow",
    "Cathedral", "Notebook", "Tower", "Valley", "Well", "Island", "Engine", "Doorway", "Market", "Horizon",
)  # fmt: skip


def sentiment_words() -> dict[str, list[str]]:
    """Every group's sentiment words together, by sentiment."""
    return {
        sentiment: sorted({word for style in STYLES for word in style.adjectives(sentiment)})
        for sentiment in ("positive", "neutral", "negative")
    }


def title(number: int) -> str:
    """The title of item `number`: unique, the first 900 without a volume number."""
    pairs = len(TITLE_ADJECTIVES) * len(TITLE_NOUNS)
    # 7 and 900 share no factor: a walk through all pairs in which neighbors differ
    adjective, noun = divmod(number * 7 % pairs, len(TITLE_NOUNS))
    name = f"The {TITLE_ADJECTIVES[adjective]} {TITLE_NOUNS[noun]}"
    return name if number < pairs else f"{name} {number // pairs + 1}"


def sentence(style: Style, sentiment: str, features: tuple[str, ...], choice: tuple[int, int, int, int]) -> str:
    """One explanation of one or two features; `choice` holds draws >= 0 for pattern, closing and two adjectives."""
    adjectives = style.adjectives(sentiment)
    first = adjectives[choice[2] % len(adjectives)]
    closing = style.closings[choice[1] % len(style.closings)]
    if len(features) == 1:
        body = style.one[choice[0] % len(style.one)].format(f=features[0], a=first)
    else:
        second = adjectives[(choice[2] + 1 + choice[3] % (len(adjectives) - 1)) % len(adjectives)]
        pattern = style.two[choice[0] % len(style.two)]
        body = pattern.format(f=features[0], g=features[1], a=first, b=second)
    return body[0].upper() + body[1:] + closing
