"""Source formats; a reader yields raw batches and leaves their validation to `data.validation`.

    formats      the table of source formats
    batches      batches of raw records, bounded
    json_lines   JSON lines and arrays, plain or gzip
    tables       CSV and Parquet
    pickles      reviews.pickle without running anything in it

Shape letters: R rows of a batch.
"""
