"""Texts and batches for training and evaluation."""
