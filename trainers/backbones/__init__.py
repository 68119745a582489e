"""Backbones: what differs between the models that are trained; everything else uses their few functions."""
