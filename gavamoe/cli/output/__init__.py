"""What commands print.

summary      what most commands print when they are done
systems      ablate and human-eval
plan         gavamoe plan
search       gavamoe tune, while it runs and after
cluster      jobs and a run's state
"""
