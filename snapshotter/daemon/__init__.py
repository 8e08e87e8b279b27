"""The daemon: where everything is put together, and the edges to containerd, systemd and Prometheus."""
