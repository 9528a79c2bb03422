"""How likely a trained model finds each evaluated row's own text, and whether gates pay by that measure.

    row_losses   losses.parquet: a line a row, and its summary
    measure      the model reads the rows as shown, with the user hidden, as a stranger's
    differences  systems on the same rows, bootstrapped over users
    verdict      do gates pay, for whom, by how much: in words
    display      tables and a forest plot

Shape letters: N rows, B rows of a batch, U users, S systems, P scored positions, V vocabulary.
"""
