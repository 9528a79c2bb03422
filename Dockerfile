# The image of cluster.yaml and the KubeRay manifests; it also runs the README's two commands:
#
#   docker build --tag gavamoe .
#   docker run --rm gavamoe                    make quickstart
#   docker run --rm gavamoe make test
#
# On GPUs: --gpus all. PyPI's torch brings its CUDA libraries. DeepSpeed compiles its CPU Adam (stage2.offload_optimizer)
# with nvcc: build on a base that has it, --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# g++: DeepSpeed builds a small operation at its first start. rsync, openssh-client: the Ray cluster launcher.
# chromium: the tests of the service's page; they are left out where it is missing.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make python3-venv rsync openssh-client chromium \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 gavamoe \
    && mkdir /opt/gavamoe && chown gavamoe:gavamoe /opt/gavamoe
USER gavamoe
WORKDIR /opt/gavamoe

# Packages first: they change less often than the code.
COPY --chown=gavamoe:gavamoe pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY --chown=gavamoe:gavamoe gavamoe/__init__.py gavamoe/__init__.py
COPY --chown=gavamoe:gavamoe configs configs
COPY --chown=gavamoe:gavamoe tune_spaces tune_spaces
COPY --chown=gavamoe:gavamoe jobs jobs
RUN make install PYTHON=python3

COPY --chown=gavamoe:gavamoe . .
# Not remade by make: only the time stamps of its prerequisites have changed.
RUN touch .venv/.ready
# The service's HAProxy with deadlines and JSON errors (serve/kuberay.yaml names it).
RUN .venv/bin/python -m gavamoe.serving.proxy /opt/gavamoe/haproxy
ENV PATH=/opt/gavamoe/.venv/bin:$PATH

CMD ["make", "quickstart"]
