# The sidecar: one static program and the authorities that it trusts. `COPY --from` takes it into functions' images.
FROM rust:1.92-alpine AS build
RUN apk add --no-cache musl-dev=~1
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p faaswap-sidecar --config 'profile.release.strip="symbols"'

FROM scratch
COPY --from=build /src/target/release/faaswap-sidecar /faaswap-sidecar
# For models on https servers; Mozilla's, of the build's image.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
# Nobody; the broker's socket lets any user in.
USER 65532:65532
ENTRYPOINT ["/faaswap-sidecar"]
