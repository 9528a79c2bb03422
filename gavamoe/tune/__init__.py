"""`gavamoe tune`: Ray Tune with Optuna over any config field.

search    search, train the best, score it once
space     search spaces, typed and validated
checks    a space against config and dataset
metrics   what can be searched for
study     the Optuna study: who has which values, what came out
ray_tune  Ray Tune runs the trials
trial     one trial
folder    whose results folder it is; the dataset without its test rows
report    trials.parquet, best.yaml, plots
"""
