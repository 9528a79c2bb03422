"""Token ids of users and items: the one layout, for the model, the prompts and id dropout."""

from pydantic import BaseModel, ConfigDict


class SlotIds(BaseModel):
    """Token ids of users and items: above the vocabulary, known ones and one for all others, users first.

    The layout of `GavamoeForCausalLM.user_token` and `item_token`, for code that has no model loaded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    vocabulary: int
    """Number of text tokens, whose ids come first."""
    n_users: int
    """Known users."""
    n_items: int
    """Known items."""

    def user_token(self, index: int) -> int:
        """Token id of a user by index; every index from `n_users` on is the unknown user."""
        return self.vocabulary + min(index, self.n_users)

    def item_token(self, index: int) -> int:
        """Token id of an item by index; every index from `n_items` on is the unknown item."""
        return self.vocabulary + self.n_users + 1 + min(index, self.n_items)
