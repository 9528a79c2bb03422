"""Token ids of users and items: the one layout, for the model, the prompts and id dropout."""

from pydantic import BaseModel, ConfigDict


class SlotIds(BaseModel):
    """Token ids of users and items: above the vocabulary, known ones and one for all others, users first.

    The layout of `GavamoeForCausalLM.user_token` and `item_token`, for whoever has no model at hand.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    vocabulary: int
    n_users: int
    n_items: int

    def user_token(self, index: int) -> int:
        return self.vocabulary + min(index, self.n_users)

    def item_token(self, index: int) -> int:
        return self.vocabulary + self.n_users + 1 + min(index, self.n_items)
