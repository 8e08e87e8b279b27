"""SOCI artifacts of an image: the index, the zTOCs it lists, and where they are kept locally.

Works on content behind a small protocol; knows neither registries nor containerd.
"""
