"""Qwen2.5-VL. Flax lives in this room only; outside, parameters are a plain nested dict."""
