"""Figures of training runs, and how all figures look."""
