"""Tuning: how strongly, where and on which tokens a direction should write, found in closed loop and checked on held-out starts."""
