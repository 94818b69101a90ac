# monai-iunet with its bundles, for the CPU or for NVIDIA GPUs; it needs no network when it runs:
#   docker build -t monai-iunet .
#   docker build -t monai-iunet:cuda --build-arg DEVICE=cuda .
#   docker run --rm --network none -v "$PWD:/data" --user "$(id -u):$(id -g)" monai-iunet segment scan.nii.gz --output labels

FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY monai_iunet monai_iunet
COPY bundles bundles
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG DEVICE=cpu
COPY constraints.txt /tmp/constraints.txt
# The index of PyTorch has builds without CUDA; those of the ordinary index have it.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    { [ "$DEVICE" = cpu ] || [ "$DEVICE" = cuda ]; } \
    && if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi \
    && pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[bids,dicom,report]" \
    && rm /tmp/constraints.txt \
    && useradd --create-home --uid 1000 reader
# A place for what matplotlib and others keep, whoever runs it.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
USER 1000
WORKDIR /data
ENTRYPOINT ["monai-iunet"]
