"""The longest ids, titles, features and texts, for `data prepare` and for requests to the service alike.

What is within them here can be trained and asked for; what is beyond them is rejected, counted and kept in
`rejected.jsonl`, but for titles and texts, which are cut between words.
"""

MAX_ID_CHARS = 256
MAX_TITLE_CHARS = 200
MAX_FEATURE_CHARS = 64
MAX_EXPLANATION_CHARS = 2_000
"""Longest explanation kept from a source whose texts are explanations already."""
MAX_REVIEW_CHARS = 20_000
"""How much of a review is searched for a sentence."""
MAX_SENTENCE_CHARS = 300
"""Longest sentence chosen from a review."""
