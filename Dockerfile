# Operator image. Build it from the root of the repository: `docker build -t tunewright-operator .`
# BASE_IMAGE can be any image with Python 3.11 or later and its venv module.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS requirements
COPY pyproject.toml /build/
# Only the dependencies, so that another change of pyproject.toml leaves the layers below as they are.
RUN python3 -c "import tomllib; p = tomllib.load(open('/build/pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['operator'], sep='\\n')" > /build/requirements.txt

FROM ${BASE_IMAGE} AS build
# A build that mounts a cache of uv at /root/.cache/uv sets this to 0.
ARG UV_NO_CACHE=1
# Bytecode is compiled now, because a read-only root file system takes none later.
ARG UV_COMPILE_BYTECODE=1
ARG UV_LINK_MODE=copy
COPY constraints.txt /build/
COPY --from=requirements /build/requirements.txt /build/
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --constraint /build/constraints.txt uv \
    && python3 -m venv --without-pip /opt/tunewright \
    && /opt/uv/bin/uv pip install --python /opt/tunewright/bin/python \
        --requirements /build/requirements.txt --constraints /build/constraints.txt
COPY pyproject.toml README.md LICENSE /build/
COPY operator /build/operator
COPY trainer_image/tunewright_trainer /build/trainer_image/tunewright_trainer
RUN /opt/uv/bin/uv pip install --python /opt/tunewright/bin/python --no-deps --target /opt/code /build

# Only what runs: no installer. The code is a layer of its own, so that a change of code is a small one.
FROM ${BASE_IMAGE}
COPY --from=build /opt/tunewright /opt/tunewright
COPY --from=build /opt/code /opt/code

ENV PATH=/opt/tunewright/bin:${PATH} \
    PYTHONPATH=/opt/code \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
# A number, so that the kubelet can check runAsNonRoot.
USER 65532:65532
ENTRYPOINT ["python", "-m", "tunewright_operator"]
