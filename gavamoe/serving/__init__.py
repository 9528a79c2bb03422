"""The service: a trained run behind HTTP, on Ray Serve. docs/serve.md is the guide.

Only `deployments` and `launch` know Ray; the rest is the same service in one process, which is how it is tested.
"""
