"""stage1/ -> stage2/: explanations; `gavamoe train --stage 2` as a Ray job.

gavamoe submit stage2 ARGUMENTS --address ADDRESS      (or: ray job submit -- python jobs/stage2.py ARGUMENTS)
"""

from gavamoe.cli import run_job

run_job("train", "--stage", "2")
