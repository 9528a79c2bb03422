"""Embedding tables of users and items, by `stage1.tables`: what stage 1 trains and the explainer's slots read.

    layout     which kind of table, of how many rows; makes it
    embedding  what all tables can do; a row for each id
    hashed     k rows of a smaller table for each id, summed
    mapped     rows looked up in memory-mapped files
    row_files  those files: ranges of rows, written block by block

Shape letters: N ids with a vector of their own, B ids of a batch, k hashes, M rows of a hashed table, E embedding size,
C columns of values that are added, R rows that are looked up.
"""
