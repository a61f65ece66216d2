# Operator image. Build it from the root of the repository: `docker build -t tunewright-operator .`
# BASE_IMAGE can be any image with Python 3.11 or later and its venv module.
ARG BASE_IMAGE=python:3.12-slim

# The installer stays in this stage: it is mounted where it is needed and is no part of the result.
FROM ${BASE_IMAGE} AS installer
COPY constraints.txt /build/
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --constraint /build/constraints.txt uv

FROM ${BASE_IMAGE}
# A build that mounts a cache of uv at /root/.cache/uv sets this to 0.
ARG UV_NO_CACHE=1
# Bytecode is compiled now, because a read-only root file system takes none later.
ARG UV_COMPILE_BYTECODE=1
ARG UV_LINK_MODE=copy
# Dependencies first and the code last: a change of code leaves the large layer as it is.
COPY pyproject.toml constraints.txt /build/
RUN --mount=type=bind,from=installer,source=/opt/uv,target=/opt/uv \
    python3 -m venv --without-pip /opt/tunewright \
    && /opt/uv/bin/uv pip install --python /opt/tunewright/bin/python \
        --requirements /build/pyproject.toml --extra operator --constraints /build/constraints.txt
COPY README.md LICENSE /build/
COPY operator /build/operator
COPY trainer_image/tunewright_trainer /build/trainer_image/tunewright_trainer
RUN --mount=type=bind,from=installer,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv pip install --python /opt/tunewright/bin/python --no-deps /build

ENV PATH=/opt/tunewright/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
# A number, so that the kubelet can check runAsNonRoot.
USER 65532:65532
ENTRYPOINT ["python", "-m", "tunewright_operator"]
