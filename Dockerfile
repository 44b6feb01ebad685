# syntax=docker/dockerfile:1
# One image for every part: `rushes dispatcher`, `rushes worker`, `rushes migrate` and the rest.
# The GPU driver comes from the host through the NVIDIA container toolkit; PyPI's torch brings CUDA.
FROM python:3.13.16-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# Kernels are compiled where they run, by triton with a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# What of the driver the container toolkit brings in; `video` is the GPU's own H.264 encoder.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

WORKDIR /opt/rushes

# Optional parts that the image carries. `gradio` cannot be one of them: it needs an older pillow.
ARG EXTRAS="c2pa notify traces"

# The large layer first: it stays the same until the requirements change.
COPY pyproject.toml constraints.txt ./
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *(r for e in sys.argv[1:] for r in p['optional-dependencies'][e]), sep='\n')" ${EXTRAS} > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Editable: presets, migrations and the tiny model are found where they are in the repository.
COPY . .
RUN pip install --no-deps --editable . \
    && python -m compileall -q jobs models worker

# State of this container: scratch files, signs of life. A volume keeps what is not yet uploaded.
ENV RUSHES_HOME=/var/lib/rushes \
    RUSHES_MODELS_DIR=/models
RUN useradd --uid 10001 --create-home rushes \
    && install -d -o rushes -g rushes /var/lib/rushes
USER rushes
WORKDIR /var/lib/rushes

ENTRYPOINT ["rushes"]
CMD ["--help"]
