"""Training engines, which take optimizer steps; `training_engines` picks one.

interface        what the training loop sees of an engine
plain            torch alone, one process
zero             DeepSpeed at any ZeRO stage
settings         DeepSpeed's configuration
expert_parallel  experts sharded over workers; all-to-all of tokens
"""
