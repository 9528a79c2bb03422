"""Texts as words, and sentences judged by them.

words            texts parted into words, vectorised
sentence_scores  how well a sentence would explain its review
"""
