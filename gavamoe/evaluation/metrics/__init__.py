"""Scores of texts against references.

    registry     name, direction, unit and definition of each metric
    ngrams       n-grams, longest common subsequence
    sacrebleu    BLEU and ROUGE of the libraries
    peter        BLEU and ROUGE as the PETER line of papers computes them
    bertscore    raw, and the floor it is rescaled by
    text_scores  the scores of any group of rows

Shape letters: N rows, M columns of statistics that add up over rows.
"""
