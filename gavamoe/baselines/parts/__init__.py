"""Parts that single baselines are made of, each of use to others too.

adapters       low-rank adapters on a baseline's language model
rating_tokens  a rating as a distribution over tokens
evidence       training explanations that a prompt quotes
"""
