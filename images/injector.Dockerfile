# The injector: one static program, nothing else. It trusts the cluster's authority, which its pod brings.
FROM rust:1.92-alpine AS build
RUN apk add --no-cache build-base=~0.5
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p faaswap-injector --config 'profile.release.strip="symbols"'

FROM scratch
COPY --from=build /src/target/release/faaswap-injector /faaswap-injector
USER 65532:65532
ENTRYPOINT ["/faaswap-injector"]
