"""Runs on disk: record what goes over the topics, show it, and run its inferences again."""
