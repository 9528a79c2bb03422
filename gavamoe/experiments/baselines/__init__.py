"""Rival systems behind `evaluation.evaluate.Writer`.

    retrieval    systems that copy the nearest training text
    peter_model  PETER: a small Transformer
    peter_train  its training, its folder, its texts

Shape letters: N training rows, B rows, T tokens, D embedding size, V vocabulary.
"""
