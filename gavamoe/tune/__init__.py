"""`gavamoe tune`: Ray Tune with Optuna over any config field.

search    search, train the best, score it once
space     search spaces, typed and validated
checks    a space against config and dataset
metrics   what can be searched for
study     the Optuna study: which values were drawn, and their results
session   what is under way, and what has ended; for whoever shows it
ray_tune  Ray Tune runs the trials
trial     one trial
folder    the results folder and its lock; the dataset without its test rows
report    trials.parquet, best.yaml, plots
"""
