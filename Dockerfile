# docker build --build-arg TORCH=cpu -t weft .       (TORCH=cuda for NVIDIA GPUs)
# docker run --rm -p 127.0.0.1:8000:8000 -e WEFT_API_KEYS=a-long-secret \
#     -v weft-models:/models -v weft-data:/data weft
#
# One slim base image serves both builds: the CUDA wheels bring their own libraries.
FROM python:3.11-slim AS builder
ARG TORCH=cpu
ENV VENV=/opt/weft \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY requirements requirements
COPY scripts/install.sh scripts/install.sh
RUN scripts/install.sh --dependencies-only
COPY LICENSE README.md ./
COPY samplers samplers
COPY guidance guidance
COPY server server
COPY embedded embedded
COPY benchmarks benchmarks
RUN /opt/weft/bin/python -m pip install --no-deps --no-build-isolation --no-index .

FROM python:3.11-slim
# torch and huggingface-hub look up the name and the home directory of the user.
RUN useradd --create-home --uid 10001 --user-group weft \
    && install --directory --owner weft --group weft /models /data
COPY --from=builder /opt/weft /opt/weft
ENV PATH=/opt/weft/bin:$PATH \
    HOME=/home/weft \
    HF_HOME=/data/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/data/torchinductor \
    PYTHONUNBUFFERED=1
# A number, so that an orchestrator can verify that it is not root.
USER 10001:10001
WORKDIR /home/weft
VOLUME ["/models", "/data"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
CMD ["weft", "serve", "--host", "0.0.0.0", "--port", "8000"]
