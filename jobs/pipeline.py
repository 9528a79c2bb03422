"""dataset -> stage1/ -> stage2/ -> evaluation/ -> report.html; `gavamoe train --evaluate` as a Ray job.

gavamoe submit pipeline ARGUMENTS --address ADDRESS      (or: ray job submit -- python jobs/pipeline.py ARGUMENTS)
"""

from gavamoe.cli import run_job

run_job("train", "--evaluate")
