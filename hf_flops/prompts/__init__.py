"""Prompts that are trained: after the text, on images, and how their rows share a text."""
