"""Texts for a whole file of requests, without a server.

request_file  requests from Parquet, JSON lines or CSV, row by row
text_file     their texts, block by block; goes on where it was interrupted
"""
