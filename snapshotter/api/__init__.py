"""Generated from proto/ by proto/generate.py: containerd's services as this project speaks them."""
