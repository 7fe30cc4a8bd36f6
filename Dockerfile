# Build and run it as docs/operating.md says, or with `docker compose up`.
#
# One slim base image serves both builds: the CUDA wheels bring their own libraries. The digest is
# that of python:3.11.16-slim-trixie.
ARG PYTHON_IMAGE=python:3.11-slim@sha256:be1575ed968de893bd54f4c56315ff7c4736ce522c1bca08fd521731aafc0d76

FROM ${PYTHON_IMAGE} AS builder
ARG TORCH=cpu
ENV VENV=/opt/weft \
    PIP_NO_CACHE_DIR=1 \
    UV_NO_CACHE=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY requirements requirements
COPY scripts/install.sh scripts/install.sh
RUN scripts/install.sh --dependencies-only
# A tenth of the image would be torch's own tests in C++.
RUN cd /opt/weft/lib/python3*/site-packages/torch && rm -rf test bin/test_* bin/*Test
COPY LICENSE README.md weft.py weft_plugins.py ./
COPY samplers samplers
COPY guidance guidance
COPY server server
COPY embedded embedded
RUN /opt/weft/bin/python -m pip install --no-deps --no-build-isolation --no-index .
COPY scripts/healthcheck.py /opt/weft/bin/healthcheck.py

FROM ${PYTHON_IMAGE}
RUN useradd --create-home --uid 10001 --user-group weft \
    && mkdir /models && install --directory --owner weft --group weft --mode 700 /data /cache
COPY --from=builder /opt/weft /opt/weft
# USER is what torch looks up where the user who runs the container has no name. Nothing is written
# but what libraries may put into /tmp, so the root file system can be read-only, and what an
# operator asks for: durable jobs and models that are fetched or converted. Volumes for them belong
# at /data and /cache, from whose owner in the image Docker takes that of a new volume.
ENV PATH=/opt/weft/bin:$PATH \
    USER=weft \
    HF_HOME=/tmp/huggingface \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    WEFT_HOST=0.0.0.0 \
    WEFT_PORT=8000 \
    WEFT_MODELS_FOLDER=/models \
    WEFT_DRAIN_S=9
# A number, so that an orchestrator can verify that it is not root.
USER 10001:10001
WORKDIR /home/weft
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "/opt/weft/bin/healthcheck.py"]
CMD ["weft", "serve"]
