# camserve for CPU and GPU, from one file.
#
#   docker build -t camserve .
#   docker build -t camserve --build-arg EXTRAS=otel,timm .         more of pyproject.toml's extras
#   docker build -t camserve --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:… .
#
# Nothing from a package index runs before its hash is checked: the hashes are in deploy/image, written by
# `make lock`. See docs/how-to/deploy.md, also for the size of the image.

# A tag is what the registry has today; a release also sets the digest.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1


# The requirements as separate files, so that another change of pyproject.toml (the version, a rule of
# the linter) does not install torch again.
FROM base AS requirements
ARG EXTRAS=otel
WORKDIR /requirements
COPY pyproject.toml deploy/image/packages.txt ./
RUN python - <<'END'
import os, pathlib, re, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]


def needed(extras):
    for extra in filter(None, extras.split(",")):
        for each in project["optional-dependencies"][extra.strip()]:
            # An extra may name others of this project, which no index has.
            own = re.fullmatch(r"camserve\[(.+)\]", each)
            yield from needed(own[1]) if own else [each]


service = [*project["dependencies"], *needed(os.environ["EXTRAS"])]
pathlib.Path("service.txt").write_text("\n".join(service) + "\n")
pins = re.findall(r"^[a-z0-9]\S*==\S+", pathlib.Path("packages.txt").read_text(), re.MULTILINE)
pathlib.Path("pins.txt").write_text("\n".join(pins) + "\n")
END


# An empty environment without pip, filled from outside by the next two stages.
FROM base AS empty
RUN python -m venv --without-pip /opt/camserve
# Empty build arguments count as unset. An index that requires a password gets it from a secret:
# `--secret id=netrc,src=$HOME/.netrc` leaves no trace in the image or its history.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore


FROM empty AS dependencies
# Required by torch, never used by this service: Triton needs a C compiler at run time.
ARG LEAVE_OUT=triton
# Distributions, comma-separated, that another index provides in its own builds: `torch,torchvision`.
ARG UNHASHED
COPY --from=requirements /requirements/service.txt /requirements/pins.txt /requirements/
COPY deploy/image/packages.txt deploy/image/pick.py /requirements/
# Downloads are kept for the next build, in one folder per index: pip's own cache keeps only
# what an index allows. Only wheels: a source distribution runs code before its hash is checked.
RUN --mount=type=cache,target=/fetched \
    --mount=type=secret,id=netrc,target=/root/.netrc \
    pip() { python -m pip --python /opt/camserve/bin/python "$@"; } \
    && cd /requirements \
    && fetched=/fetched/$(echo "$PIP_INDEX_URL $PIP_EXTRA_INDEX_URL" | sha256sum | cut -c 1-16) \
    && pip download --no-cache-dir --only-binary :all: --dest "$fetched" -c pins.txt -r service.txt \
    && pip install --quiet --dry-run --report resolved.json \
        --only-binary :all: --no-index --find-links "$fetched" -c pins.txt -r service.txt \
    && python pick.py resolved.json packages.txt "$UNHASHED" \
    && pip install --no-compile --no-deps --no-index --find-links "$fetched" \
        --require-hashes --only-binary :all: -r hashed.txt \
    && if [ -s unhashed.txt ]; then pip install --no-compile --no-deps --no-index \
        --only-binary :all: --find-links "$fetched" -r unhashed.txt; fi \
    && if [ -n "$LEAVE_OUT" ]; then pip uninstall --yes $LEAVE_OUT; fi
# Headers and test suites are not needed. Bytecode is written now, since the root is read-only
# later, and is unchecked, since layers change the times of files. Files that do not compile are
# for another Python version and never imported.
RUN cd /opt/camserve/lib/python3*/site-packages \
    && rm -rf torch/include torch/share torch/test torch/bin/*test* \
    && { python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x '/tests?/' . || true; }


# The build tools of camserve and the generator of the SBOM; none of them are in the image.
FROM empty AS tools
COPY deploy/image/tools.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=netrc,target=/root/.netrc \
    python -m pip install --no-deps --require-hashes --only-binary :all: \
        --requirement /requirements/tools.txt


FROM tools AS sbom
ARG VERSION=0.1.0
COPY deploy/image/sbom.py /requirements/
RUN --mount=type=bind,from=dependencies,source=/opt/camserve,target=/opt/camserve \
    python /requirements/sbom.py /opt/camserve/bin/python "$VERSION" /sbom/camserve.cdx.json


FROM tools AS code
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY api_schemas api_schemas
COPY service service
COPY camserve camserve
RUN python -m pip wheel --quiet --no-build-isolation --no-deps --no-index --wheel-dir /wheels . \
    && python -m pip --python /opt/camserve/bin/python install \
        --no-compile --no-deps --no-index /wheels/*.whl \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/camserve/lib


FROM base AS final
# /cache is for a volume: weights of torchvision and timm, and compiled fronts of models.
RUN groupadd --gid 10001 camserve \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin \
        camserve \
    && install --directory --owner=10001 --group=10001 /cache /models \
    && python -m pip uninstall --quiet --yes --root-user-action ignore pip setuptools wheel \
    && python -m compileall -q --invalidation-mode unchecked-hash /usr/local/lib/python3*/ \
        -x '/(test|tests|lib2to3|idlelib|turtledemo|site-packages)/'
COPY --link --from=dependencies /opt/camserve /opt/camserve
COPY --link --from=sbom /sbom /usr/local/share/sbom
COPY --link --from=code /opt/camserve /opt/camserve

# The next batch reuses the memory that one batch frees: see docs/how-to/tune.md.
ENV PATH=/opt/camserve/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    MALLOC_MMAP_THRESHOLD_=1073741824 \
    MALLOC_TRIM_THRESHOLD_=268435456 \
    MALLOC_ARENA_MAX=2 \
    TORCH_HOME=/cache/torch \
    HF_HOME=/cache/huggingface \
    CAMSERVE_CACHE_DIR=/cache/camserve \
    CAMSERVE_HOST=0.0.0.0 \
    CAMSERVE_PORT=8000 \
    CAMSERVE_LOG_FORMAT=json

USER 10001:10001
WORKDIR /models
EXPOSE 8000

# Readiness, not liveness: services that wait for this container need its models.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --start-interval=1s --retries=3 \
    CMD ["python", "-ISc", "import http.client, os, sys; ask = http.client.HTTPConnection('127.0.0.1', int(os.environ['CAMSERVE_PORT']), timeout=4); ask.request('GET', '/health/ready'); sys.exit(ask.getresponse().status != 200)"]

ENTRYPOINT ["camserve"]
CMD ["serve"]

ARG PYTHON_IMAGE
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="camserve" \
      org.opencontainers.image.description="PyTorch image classifiers over HTTP, every prediction with the evidence for it" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
