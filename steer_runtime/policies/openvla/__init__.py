"""OpenVLA on transformers' own classes: no remote code, no `generate()`."""
