# The converter as an image. With the Docker socket mounted, two bare names are
# images of the engine, and the chunks go to /output/rootfs.castr:
#
#   docker run -i -v /var/run/docker.sock:/var/run/docker.sock -v "$PWD":/output \
#     IMAGE ubuntu:latest ubuntu-converted:latest
#
# `docker build .` compiles in a container and needs nothing but Docker.
# `docker build --target prebuilt .` takes bin/bootfs-convert, which make build
# has made, and needs no network: make image does that.

# What the converter stands on. It needs no file of it but, for registries on
# the network, the certificates that are copied below or come with BASE.
ARG BASE=debian:bookworm-slim
ARG GO_IMAGE=golang:1.26-bookworm

FROM ${BASE} AS common
# A name without a transport is an image of the engine, and that cannot hold
# chunks.
ENV BOOTFS_BARE_TRANSPORT=docker-daemon \
    BOOTFS_STORE=/output/rootfs.castr
VOLUME /output
ENTRYPOINT ["bootfs-convert"]

FROM common AS prebuilt
COPY bin/bootfs-convert /usr/local/bin/bootfs-convert

FROM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN make build

FROM common
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/bin/bootfs-convert /usr/local/bin/bootfs-convert
