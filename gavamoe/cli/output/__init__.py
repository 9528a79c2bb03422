"""What commands print.

data         data prepare, data describe
training     train
scores       evaluate, score, quickstart
explanation  route, explain
systems      ablate and human-eval
plan         gavamoe plan
search       gavamoe tune, while it runs and after
cluster      jobs and a run's state
"""
