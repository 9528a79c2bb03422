"""`gavamoe plan`: what a config costs, before paying.

    estimate       memory, time and traffic of a config; lengths and counts from a dataset
    parameters     parameters by part, counted without weights
    memory         bytes on a device by ZeRO stage
    stage1_tables  stage 1's memory, traffic and time, with tables whole, sharded and hashed
    work           FLOPs, time, traffic

Shape letters: B rows, T tokens of a row, M = B x T tokens, S scored positions of a row, D hidden size, W devices (the
workers of a run), G bytes that are exchanged.
"""
