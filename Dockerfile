# Two images, by BuildKit (Docker 23 or newer). The first, which is also that of cluster.yaml and cluster/kuberay.yaml,
# runs the README's two commands and the jobs of a cluster; the second, that of serve/kuberay.yaml, has what the service
# needs: no tests, compiler or git.
#
#   docker build --tag gavamoe .
#   docker run --rm gavamoe                    make quickstart
#   docker run --rm gavamoe make test
#
#   docker build --target serve --tag gavamoe-serve .
#   docker run --rm -p 8000:8000 -v $PWD/runs:/runs:ro -e GAVAMOE_API_KEYS gavamoe-serve      serves runs/quickstart
#
# On GPUs: --gpus all, with a driver of 580 or newer: PyPI's torch 2.13 brings the libraries of CUDA 13. Nothing here
# needs nvcc.
#
# A tag can be moved to other content. `docker buildx imagetools inspect python:3.11-slim-bookworm` prints the digest of
# what it names today: --build-arg BASE=python:3.11-slim-bookworm@sha256:... builds on exactly that.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS base

# wget: KubeRay asks by it whether a pod is well.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*

# The profile: Ray's cluster launcher and KubeRay start their commands in a login shell, in which /etc/profile sets PATH
# anew.
RUN useradd --create-home --uid 1000 gavamoe \
    && mkdir /opt/gavamoe && chown gavamoe:gavamoe /opt/gavamoe \
    && echo 'export PATH=/opt/gavamoe/.venv/bin:$PATH' > /etc/profile.d/gavamoe.sh
WORKDIR /opt/gavamoe


# Every package as a wheel, made from files whose SHA-256 constraints.hashes.txt has: the stages below install from them
# alone. Before the code, which changes more often.
FROM base AS wheels
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make
COPY Makefile constraints.hashes.txt ./
RUN make wheels WHEELS=/wheels PYTHON=python3


# The package itself as a wheel.
FROM wheels AS package
COPY pyproject.toml README.md LICENSE ./
COPY gavamoe gavamoe
COPY configs configs
COPY tune_spaces tune_spaces
COPY jobs jobs
RUN make package WHEELS=/wheels


FROM base AS serve
USER gavamoe
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    python3 -m venv .venv && .venv/bin/pip install --no-cache-dir --no-index --find-links /wheels gavamoe
# The service's HAProxy with deadlines and JSON errors (serve/kuberay.yaml names it).
RUN .venv/bin/python -m gavamoe.serving.proxy /opt/gavamoe/haproxy
ENV PATH=/opt/gavamoe/.venv/bin:$PATH
# Refused without API keys, which come as GAVAMOE_API_KEYS or by --api-keys.
CMD ["gavamoe", "serve", "/runs/quickstart", "--host", "0.0.0.0"]


# The last stage is what is built where no --target is given.
FROM base AS full
# g++: DeepSpeed builds a small operation at its first start. rsync, openssh-client: the Ray cluster launcher.
# chromium: the tests of the service's page; they are left out where it is missing.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make rsync openssh-client chromium \
    && rm -rf /var/lib/apt/lists/*
USER gavamoe
COPY --chown=gavamoe:gavamoe constraints.txt ./
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --no-index --find-links /wheels --requirement constraints.txt
COPY --chown=gavamoe:gavamoe . .
# .ready: not remade by make, though its prerequisites are newer.
RUN .venv/bin/pip install --no-index --no-deps --no-build-isolation --editable . && touch .venv/.ready
RUN .venv/bin/python -m gavamoe.serving.proxy /opt/gavamoe/haproxy
ENV PATH=/opt/gavamoe/.venv/bin:$PATH

CMD ["make", "quickstart"]
