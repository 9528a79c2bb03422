"""Human evaluation: blind sheets, Human-Score, agreement.

    study        the paper's Table 6, Eq. 14's weights, the key
    export       blind sheets for raters
    results      the raters' answers, and how far they agree

Shape letters: R rows of the split, S systems, C scores (the criteria, then the Human-Score), V raters, T texts.
"""
