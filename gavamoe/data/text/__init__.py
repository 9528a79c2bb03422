"""Texts as words.

words  texts parted into words, vectorised
"""
