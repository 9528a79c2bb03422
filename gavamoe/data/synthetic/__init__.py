"""Reviews with planted user groups: the embedded dataset with a known truth.

    generator    users, items, ratings, groups
    grammar      the language that the explanations are written in

Shape letters: U users, I items, N ratings, G groups, C genres.
"""
