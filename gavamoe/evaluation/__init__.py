"""A split -> texts and numbers.

    evaluate          write and score a split
    writers           what it needs of a run, opened here or by Ray workers
    kept_texts        its texts, block by block, here or by Ray workers; kept until all are there
    rows              which rows, and what is asked for them
    score_files       `gavamoe score`: any system's texts
    text_tables       files of texts, read row by row
    significance      intervals; is a difference more than chance?
    reference_scores  constant text, mean and bias ratings
    planted_truth     how much of a planted truth was recovered
    comparison        systems side by side: means, differences, who may be ranked together
    comparison_files  the tables and Figure 3 of a comparison, as files
    decoding_choice   a way of decoding, chosen on validation rows
    metrics_file      metrics.json: its version, and the reading of older ones
    evaluated_run     an evaluated run, read back

Shape letters: N evaluated rows, U users, I items, M columns of statistics that add up over rows, R resamples.
"""
