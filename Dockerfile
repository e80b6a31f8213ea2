# smolforge on CPUs. For NVIDIA GPUs build with --build-arg PIP_EXTRA_INDEX_URL= and run with --gpus all.
#   docker build . --tag smolforge
#   docker run --rm --volume "$PWD:/work" smolforge quickstart
FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt "/source[all]"
RUN useradd --create-home --uid 1000 smolforge && install --directory --owner smolforge /work
USER smolforge
WORKDIR /work
ENTRYPOINT ["smolforge"]
