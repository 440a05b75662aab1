"""Training of the pocket policy: vision from privileged heatmaps, then actions from demonstrations."""
