"""`gavamoe plan`: what a config costs, before paying.

    estimate    memory, time and traffic of a config; lengths and counts from a dataset
    parameters  parameters by part, counted without weights
    memory      bytes on a device by ZeRO stage
    work        FLOPs, time, traffic

Shape letters: B rows, T tokens of a row, M = B x T tokens, S scored positions of a row, D hidden size, W devices (the
workers of a run), G bytes that are exchanged.
"""
