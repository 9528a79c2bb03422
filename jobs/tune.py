"""a search; its trials are spread over the cluster; `gavamoe tune` as a Ray job.

gavamoe submit tune ARGUMENTS --address ADDRESS      (or: ray job submit -- python jobs/tune.py ARGUMENTS)
"""

from gavamoe.cli import run_job

run_job("tune")
