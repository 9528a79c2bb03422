"""reviews -> dataset folder; `gavamoe data prepare` as a Ray job.

gavamoe submit prepare ARGUMENTS --address ADDRESS      (or: ray job submit -- python jobs/prepare.py ARGUMENTS)
"""

from gavamoe.cli import run_job

run_job("data", "prepare")
