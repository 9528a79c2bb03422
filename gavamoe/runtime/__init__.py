"""Ray: workers, checkpoints, logs, trackers, jobs. Loops see a `Context` and nothing of Ray.

context      what a training loop is told, and how it reports
ray_train    gives a loop its workers, checkpoints, restarts
worker       the workers' side: context, checkpoints with checksums
tracking     logs, TensorBoard, MLflow, Weights & Biases
progress     how long work says how far it is
jobs         the same commands as Ray jobs on a cluster
"""
