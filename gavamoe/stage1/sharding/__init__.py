"""Stage 1's tables in training, by `stage1.tables`: whole on every worker, or each worker a range of the rows.

    held_tables     what the trainer does with either kind: optimizer, best state, checkpoints, artifact
    shard_files     a worker's rows and their optimizer states in checkpoints
    sharded_table   a table of which each worker holds a range of rows: lookups and gradients by all-to-all
    row_ranges      which worker holds which rows; rows to and from rank 0

Shape letters: W workers, B ids of a batch, R different rows of it, E embedding size, C columns.
"""
