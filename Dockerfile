# Two images of one source: `server` (API, migrations; no torch) and `worker` (torch with CUDA).
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 quantry && install --directory --owner quantry /data
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY quantry quantry
COPY app app
COPY worker worker
COPY migrations migrations

FROM base AS server
RUN pip install --constraint constraints.txt '.[app]'
WORKDIR /home/quantry
USER quantry
VOLUME /data
EXPOSE 8000
CMD ["quantry-server", "api", "--host", "0.0.0.0"]

FROM base AS worker
RUN pip install --constraint constraints.txt '.[worker]'
WORKDIR /home/quantry
USER quantry
VOLUME /data
CMD ["quantry-server", "worker"]
