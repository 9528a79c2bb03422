"""Ray: workers, checkpoints, logs, trackers, jobs. Loops see a `Context` and nothing of Ray.

context        the interface between a training loop and Ray
ray_train      gives a loop its workers, checkpoints, restarts
ray_pool       actors that hold an object and do block after block of work
ordered_tasks  a function over a stream of jobs as Ray tasks, results in order
room           whether a cluster can hold them, also after its autoscaler has grown it
failures       what the end of a training means, and whether going on can help
connection     where a Ray is: the environment and options, checked; connecting, starting
worker         the workers' side: context, messages
checkpoints    stored in the background, with checksums, and found whole again
machine        is this machine ready? what is wrong, and the way out
host_memory    how a process keeps the memory of its tensors between steps
tracking       logs, TensorBoard, MLflow, Weights & Biases
progress       protocols of progress, and its line in a log
jobs           the same commands as Ray jobs on a cluster
"""
