# The runtime and its server, without PyTorch: docker build -t adalink . (docs/guides/docker.md)
ARG PYTHON=python:3.12-slim-bookworm

# hadolint ignore=DL3006
FROM ${PYTHON} AS wheels
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY export export
COPY runtime runtime
COPY serving serving
COPY tools tools
COPY training training
# The kit's own wheel alone: its dependencies go into the image in one step, below.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# hadolint ignore=DL3006
FROM ${PYTHON}
# Beside these, `vision` for images and `structured` for JSON by schema.
ARG EXTRAS=cpu,serve
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    set -- /wheels/*.whl \
    && pip install --no-cache-dir --no-compile --constraint /tmp/constraints.txt "$1[${EXTRAS}]" \
    && rm /tmp/constraints.txt \
    && useradd --system --uid 10001 --home-dir /home/adalink --create-home adalink
ENV PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/adalink
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["adalink"]
# The server asks for keys: mount a file of them, or name another command.
CMD ["serve", "/deployment", "--host", "0.0.0.0", "--port", "8000", "--api-key-file", "/run/secrets/adalink-keys"]
