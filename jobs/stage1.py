"""dataset -> stage1/: ratings and clusters; `gavamoe train --stage 1` as a Ray job.

gavamoe submit stage1 ARGUMENTS --address ADDRESS      (or: ray job submit -- python jobs/stage1.py ARGUMENTS)
"""

from gavamoe.cli import run_job

run_job("train", "--stage", "1")
