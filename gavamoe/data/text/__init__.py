"""What is done to texts: cleaned, parted, judged, searched for features.

cleaning         cleaning of texts, ids, titles; sentences
words            texts parted into words, vectorized
lexicon          word lists
features         the words in which a text speaks about an item
choosing         a text and its features for each row of a block
sentence_scores  how well a sentence would explain its review
repeats          explanations that their user wrote before
spool            a file of texts between two passes
"""
