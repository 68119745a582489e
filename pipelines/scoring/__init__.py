"""Reward models behind one protocol. Belongs here: (image, prompt) -> number. Not: what the number decides (`labels`)."""
