"""run -> evaluation/ and report.html; `gavamoe evaluate` as a Ray job.

gavamoe submit evaluate ARGUMENTS --address ADDRESS      (or: ray job submit -- python jobs/evaluate.py ARGUMENTS)
"""

from gavamoe.cli import run_job

run_job("evaluate")
