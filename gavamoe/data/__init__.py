"""Reviews of any format become a dataset folder, and are read from one.

    prepare      `data prepare`: any source -> dataset folder
    texts        second pass: a text for each row
    summary      what it found and wrote, in counts
    validation   first pass: rows accepted or rejected, with the reason
    judging      the judgment of one batch, a function of it alone
    bounds       the longest ids, titles, features and texts
    splits       ratio or index files; repeated pairs
    user_ids     users left out, ids hashed
    times        times of reviews, ISO 8601 and numbers
    dataset      the prepared folder, opened
    writer       the same, written in bounded memory
    ratings      what ratings can be, and the sentiment of one
    catalog      raw id <-> index, titles, usual features
    describe     Table 1 and more

Shape letters: N rows of a split, R rows of one batch, U users, I items, S sentences.
"""
