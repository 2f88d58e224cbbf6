"""A worker without a web framework, to run in a container: see README.md."""
