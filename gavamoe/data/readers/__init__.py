"""Source formats; a reader yields raw batches and leaves their validation to `data.validation`.

    formats      the table of source formats
    batches      batches of raw records, bounded
    several      several sources as if they were one
    sources      files opened: compressed, packed, in any encoding
    line_blocks  lines cut into blocks, to be parsed elsewhere
    json_lines   JSON: a line a record, laid out, arrays
    delimited    CSV and the like: header, quoting, values
    records      their bytes cut into records, every line accounted for
    tables       delimited files and Parquet, column by column
    pickles      reviews.pickle without running anything in it

Shape letters: R rows of a batch.
"""
