# The broker with ONNX Runtime. For a node without GPUs: --build-arg BASE=debian:12-slim --build-arg ORT=onnxruntime.
ARG BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
FROM rust:1.92-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p faaswap-broker --config 'profile.release.strip="symbols"'

FROM python:3.12-slim AS onnxruntime
ARG ORT=onnxruntime-gpu
ARG ORT_VERSION=1.31.1
WORKDIR /ort
RUN pip download --no-cache-dir --no-deps "${ORT}==${ORT_VERSION}" \
    && python -m zipfile -e ./*.whl wheel \
    && mkdir lib && cp wheel/onnxruntime/capi/libonnxruntime*.so* lib/ \
    && ln -s "libonnxruntime.so.${ORT_VERSION}" lib/libonnxruntime.so

# hadolint ignore=DL3006
FROM ${BASE}
COPY --from=onnxruntime /ort/lib/ /usr/lib/
COPY --from=build /src/target/release/faaswap-broker /usr/bin/faaswap-broker
# Else it keeps a number for this machine and a database of events, to be sent to its makers; asked for at its start, so too
# early for what a program can tell it.
ENV ORT_DISABLE_TELEMETRY=1 ORT_DYLIB_PATH=/usr/lib/libonnxruntime.so
# Root, without any capability: the folders of the node that it writes are root's.
# hadolint ignore=DL3002
USER root
ENTRYPOINT ["/usr/bin/faaswap-broker"]
CMD ["serve"]
