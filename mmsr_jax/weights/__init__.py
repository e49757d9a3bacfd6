"""Weights in and out: the published safetensors layout and our nested dict."""
