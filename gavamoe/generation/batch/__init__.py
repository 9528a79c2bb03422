"""Texts for many requests, without a server.

blocks        blocks of requests, written here or by Ray workers
request_file  requests from Parquet, JSON lines or CSV, row by row
text_file     their texts, block by block; goes on where it was interrupted
"""
